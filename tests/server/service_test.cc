// What the services take and give: every field, every error, health and reflection.
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/dynamic_message.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "server/convert.h"
#include "tests/server/fake_engine.h"
#include "tests/server/harness.h"

namespace memserve::server {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class ServiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto engine = std::make_unique<FakeEngine>();
    engine_ = engine.get();
    auto server = Server::Listen(OnAnyPort());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_TRUE(server_->Serve(std::move(engine)).ok());
    channel_ = Connect(server_->port());
    stub_ = v1::Inference::NewStub(channel_);
  }

  FakeEngine* engine_ = nullptr;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

template <typename Message>
Message Parse(const std::string& text) {
  Message message;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &message)) << text;
  return message;
}

TEST_F(ServiceTest, EveryFieldOfAGenerateRequestReachesTheEngine) {
  engine_->on_generate = [this](const FakeEngine::Generation& generation) {
    const engine::GenerateRequest& request = generation.request;
    EXPECT_EQ(request.id, "mine");
    EXPECT_THAT(std::get<std::vector<int32_t>>(request.prompt), ElementsAre(1, 2, 299));
    EXPECT_EQ(request.add_bos, false);
    EXPECT_EQ(request.sampling.temperature, 0.0f);
    EXPECT_EQ(request.sampling.top_k, 0);
    EXPECT_EQ(request.sampling.top_p, 0.5f);
    EXPECT_EQ(request.sampling.seed, 0u);
    EXPECT_EQ(request.stop.max_tokens, 7);
    EXPECT_THAT(request.stop.strings, ElementsAre("a", "b"));
    EXPECT_THAT(request.stop.token_ids, ElementsAre(3, 4));
    EXPECT_TRUE(request.stop.ignore_eos);
    EXPECT_TRUE(request.logprobs);
    EXPECT_TRUE(request.token_bytes);
    EXPECT_FALSE(request.memory.enabled);
    engine_->End(generation, engine::Finished{.stop_token_id = 3});
  };
  const Heard heard = Generate(*stub_, Parse<v1::GenerateRequest>(R"(
      request_id: "mine" model: "fake" tokens { ids: [1, 2, 299] } add_bos: false
      sampling { temperature: 0 top_k: 0 top_p: 0.5 seed: 0 }
      stop { max_tokens: 7 strings: ["a", "b"] token_ids: [3, 4] ignore_eos: true }
      output { logprobs: true token_bytes: true } memory { enabled: false })"));
  ASSERT_TRUE(heard.status.ok()) << heard.status.error_message();
  EXPECT_EQ(heard.finished.at(0).request_id(), "mine");
  EXPECT_EQ(heard.finished.at(0).stop_token_id(), 3);
}

TEST_F(ServiceTest, WhatIsUnsetStaysUnset) {
  engine_->on_generate = [this](const FakeEngine::Generation& generation) {
    const engine::GenerateRequest& request = generation.request;
    EXPECT_FALSE(request.id.empty());
    EXPECT_EQ(std::get<std::string>(request.prompt), "x");
    EXPECT_FALSE(request.add_bos.has_value());
    EXPECT_FALSE(request.sampling.temperature.has_value());
    EXPECT_FALSE(request.sampling.top_k.has_value());
    EXPECT_FALSE(request.sampling.top_p.has_value());
    EXPECT_FALSE(request.sampling.seed.has_value());
    EXPECT_FALSE(request.stop.max_tokens.has_value());
    EXPECT_THAT(request.stop.strings, IsEmpty());
    EXPECT_FALSE(request.stop.ignore_eos);
    EXPECT_FALSE(request.logprobs);
    EXPECT_TRUE(request.memory.enabled);
    engine_->End(generation, engine::Finished{});
  };
  v1::GenerateRequest request = Ask("x");
  request.mutable_memory();
  const Heard first = Generate(*stub_, request);
  const Heard second = Generate(*stub_, request);
  ASSERT_TRUE(first.status.ok()) << first.status.error_message();
  EXPECT_NE(first.finished.at(0).request_id(), second.finished.at(0).request_id());
  EXPECT_EQ(first.finished.at(0).matched_stop_case(), v1::Finished::MATCHED_STOP_NOT_SET);
}

struct BadRequest {
  std::string request;
  std::vector<std::string> named;  // field, value, limit
};

TEST_F(ServiceTest, ABadFieldOfGenerateIsNamedWithValueAndLimit) {
  const std::string text = R"(text: "x" )";
  const std::vector<BadRequest> cases = {
      {"", {"prompt", "not set"}},
      {"tokens {}", {"prompt", "no tokens"}},
      {"tokens { ids: [1, 300] }", {"prompt", "300", "index 1", "[0, 300)"}},
      {"tokens { ids: [-1] }", {"prompt", "-1", "[0, 300)"}},
      {"text: '" + std::string(1001, 'x') + "'", {"prompt", "1001", "1000"}},
      {text + "request_id: '" + std::string(257, 'i') + "'", {"request_id", "257", "256"}},
      {text + "sampling { temperature: -0.5 }", {"temperature", "-0.5", "[0, 100]"}},
      {text + "sampling { temperature: 101 }", {"temperature", "101", "[0, 100]"}},
      {text + "sampling { temperature: nan }", {"temperature", "nan", "[0, 100]"}},
      {text + "sampling { temperature: inf }", {"temperature", "inf", "[0, 100]"}},
      {text + "sampling { top_k: -1 }", {"top_k", "-1", "at least 0"}},
      {text + "sampling { top_p: 0 }", {"top_p", "0", "(0, 1]"}},
      {text + "sampling { top_p: 1.5 }", {"top_p", "1.5", "(0, 1]"}},
      {text + "sampling { top_p: nan }", {"top_p", "nan", "(0, 1]"}},
      {text + "stop { max_tokens: 0 }", {"max_tokens", "0", "at least 1"}},
      {text + "stop { strings: '' }", {"stop.strings", "string 0", "0 bytes", "256"}},
      {text + "stop { strings: ['a', '" + std::string(257, 's') + "'] }", {"stop.strings", "string 1", "257", "256"}},
      {text + "stop { strings: ['" + absl::StrJoin(std::vector<std::string>(17, "s"), "', '") + "'] }",
       {"stop.strings", "17", "16"}},
      {text + "stop { token_ids: 300 }", {"stop.token_ids", "300", "[0, 300)"}},
      {text + "stop { token_ids: [" + absl::StrJoin(std::vector<int>(65, 1), ", ") + "] }", {"stop.token_ids", "65", "64"}},
  };
  for (const BadRequest& bad : cases) {
    SCOPED_TRACE(bad.request.substr(0, 80));
    const Heard heard = Generate(*stub_, Parse<v1::GenerateRequest>(bad.request));
    EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    for (const std::string& part : bad.named) EXPECT_THAT(heard.status.error_message(), HasSubstr(part));
  }
}

TEST_F(ServiceTest, ABadFieldOfScoreIsNamedWithValueAndLimit) {
  const std::string context = R"(text: "x" )";
  const std::vector<BadRequest> cases = {
      {R"(continuations { text: "y" })", {"context", "not set"}},
      {"tokens { ids: [300] } continuations { text: 'y' }", {"context", "300", "[0, 300)"}},
      {context, {"continuations", "0", "256"}},
      {context + "continuations { text: 'y' } continuations {}", {"continuations[1]", "not set"}},
      {context + "continuations { tokens { ids: 301 } }", {"continuations[0]", "301", "[0, 300)"}},
  };
  for (const BadRequest& bad : cases) {
    SCOPED_TRACE(bad.request);
    grpc::ClientContext call;
    v1::ScoreResponse response;
    const grpc::Status status = stub_->Score(&call, Parse<v1::ScoreRequest>(bad.request), &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    for (const std::string& part : bad.named) EXPECT_THAT(status.error_message(), HasSubstr(part));
  }
}

TEST_F(ServiceTest, AnotherModelsNameIsNotFound) {
  v1::GenerateRequest request = Ask("x");
  request.set_model("other");
  const Heard heard = Generate(*stub_, request);
  EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(heard.status.error_message(), AllOf(HasSubstr("\"other\""), HasSubstr("\"fake\"")));
  grpc::ClientContext call;
  v1::ScoreResponse response;
  const auto score = Parse<v1::ScoreRequest>(R"(model: "other" text: "x" continuations { text: "y" })");
  EXPECT_EQ(stub_->Score(&call, score, &response).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(ServiceTest, EveryErrorOfTheEngineKeepsItsCodeAndMessage) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status error(static_cast<absl::StatusCode>(code), absl::StrCat("because of ", code));
    engine_->on_generate = [&](const FakeEngine::Generation& generation) { engine_->End(generation, error); };
    const Heard heard = Generate(*stub_, Ask("x"));
    EXPECT_EQ(heard.status.error_code(), code);
    EXPECT_EQ(heard.status.error_message(), error.message());
    EXPECT_EQ(RetrySeconds(heard.status).has_value(), code == grpc::StatusCode::RESOURCE_EXHAUSTED);
  }
  EXPECT_EQ(RetrySeconds(ToGrpc(absl::ResourceExhaustedError("full"))), 1);
}

TEST_F(ServiceTest, ScoreAnswersInTheOrderOfTheRequest) {
  const auto request = Parse<v1::ScoreRequest>(R"(
      request_id: "s" text: "ctx" add_bos: true memory { enabled: false }
      continuations { text: " a" } continuations { tokens { ids: [5, 6] } })");
  std::thread engine([this] {
    const FakeEngine::Scoring scoring = engine_->NextScoring();
    EXPECT_EQ(scoring.request.id, "s");
    EXPECT_EQ(std::get<std::string>(scoring.request.context), "ctx");
    EXPECT_EQ(scoring.request.add_bos, true);
    EXPECT_FALSE(scoring.request.memory.enabled);
    EXPECT_EQ(std::get<std::string>(scoring.request.continuations.at(0)), " a");
    EXPECT_THAT(std::get<std::vector<int32_t>>(scoring.request.continuations.at(1)), ElementsAre(5, 6));
    scoring.callback(
        engine::ScoreResult{.scores = {{.logprob = -1.5, .is_greedy = true, .token_ids = {9}, .token_logprobs = {-1.5f}},
                                       {.logprob = -3, .is_greedy = false, .token_ids = {5, 6}, .token_logprobs = {-1, -2}}},
                            .usage = {.prompt_tokens = 4}});
  });
  grpc::ClientContext call;
  v1::ScoreResponse response;
  const grpc::Status status = stub_->Score(&call, request, &response);
  engine.join();
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.scores_size(), 2);
  EXPECT_EQ(response.scores(0).logprob(), -1.5);
  EXPECT_TRUE(response.scores(0).is_greedy());
  EXPECT_THAT(response.scores(0).token_ids(), ElementsAre(9));
  EXPECT_FALSE(response.scores(1).is_greedy());
  EXPECT_THAT(response.scores(1).token_logprobs(), ElementsAre(-1, -2));
  EXPECT_EQ(response.usage().prompt_tokens(), 4);
  EXPECT_EQ(response.request_id(), "s");
}

TEST_F(ServiceTest, LeavingAScoreCancelsIt) {
  grpc::ClientContext call;
  v1::ScoreResponse response;
  grpc::Status status;
  std::thread client([&] {
    status = stub_->Score(&call, Parse<v1::ScoreRequest>(R"(request_id: "s" text: "x" continuations { text: "y" })"), &response);
  });
  const FakeEngine::Scoring scoring = engine_->NextScoring();
  call.TryCancel();
  EXPECT_TRUE(engine_->WaitForCancel("s"));
  scoring.callback(absl::CancelledError("cancelled"));
  client.join();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(ServiceTest, TextBecomesIdsAndIdsBecomeText) {
  grpc::ClientContext first, second, third;
  v1::TokenizeResponse ids;
  ASSERT_TRUE(stub_->Tokenize(&first, Parse<v1::TokenizeRequest>(R"(text: "Hi" add_bos: true)"), &ids).ok());
  EXPECT_THAT(ids.token_ids(), ElementsAre(256, 'H', 'i'));
  v1::DetokenizeResponse text;
  ASSERT_TRUE(stub_->Detokenize(&second, Parse<v1::DetokenizeRequest>("token_ids: [256, 72, 105] keep_special: true"), &text).ok());
  EXPECT_EQ(text.text(), "<special>Hi");
  EXPECT_EQ(stub_->Detokenize(&third, Parse<v1::DetokenizeRequest>("token_ids: 300"), &text).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ServiceTest, GetModelTellsAllThatTheEngineKnows) {
  grpc::ClientContext call;
  v1::GetModelResponse model;
  ASSERT_TRUE(stub_->GetModel(&call, {}, &model).ok());
  const auto expected = Parse<v1::GetModelResponse>(R"(
      model: "fake" architecture: "memory_llama" vocab_size: 300 max_context_tokens: 128 dim: 8 n_layers: 6 n_heads: 4 n_kv_heads: 2
      trunk_parameters: 5000000000
      value_tables { name: "layers.1.feed_forward.values.weight" layers: [1, 4] rows: 1048576 dim: 1024 format: "bf16"
                     placement: "host" bytes: 2147483648 }
      eos_token_ids: 257 bos_token_id: 256 tokenizer: "bytes" backend: "fake" isa: "none" weight_dtype: "f32"
      activation_dtype: "f32" kv_dtype: "f32" devices: 2
      memory_layers: [1, 4] memory_rows: 1048576 mem_heads: 4 mem_knn: 32)");
  EXPECT_FALSE(model.server_version().empty());
  model.clear_server_version();
  EXPECT_EQ(model.DebugString(), expected.DebugString());
}

TEST_F(ServiceTest, GetLoadTellsAllThatTheEngineKnows) {
  engine_->load_now = {.running = 1,
                       .waiting = 2,
                       .waiting_tokens = 3,
                       .kv_pages_total = 4,
                       .kv_pages_used = 5,
                       .kv_page_size = 6,
                       .steps = 7,
                       .prompt_tokens = 8,
                       .completion_tokens = 9,
                       .last_step = absl::Milliseconds(500),
                       .recent = {.median_seconds = 0.25, .p99_seconds = 0.75},
                       .draining = true};
  grpc::ClientContext call;
  v1::GetLoadResponse load;
  ASSERT_TRUE(stub_->GetLoad(&call, {}, &load).ok());
  EXPECT_EQ(load.DebugString(), Parse<v1::GetLoadResponse>(R"(
      running: 1 waiting: 2 waiting_tokens: 3 kv_pages_total: 4 kv_pages_used: 5 kv_page_size: 6 steps: 7 prompt_tokens: 8
      completion_tokens: 9 last_step_seconds: 0.5 draining: true step_median_seconds: 0.25 step_p99_seconds: 0.75)")
                                    .DebugString());
}

TEST_F(ServiceTest, AbortEndsRequestsByIdAndCountsThem) {
  v1::GenerateRequest request = Ask("x");
  request.set_request_id("one");
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, request);
  const FakeEngine::Generation generation = engine_->NextGeneration();
  generation.listener->OnDelta({.text = "a"});
  grpc::ClientContext call;
  v1::AbortResponse response;
  ASSERT_TRUE(stub_->Abort(&call, Parse<v1::AbortRequest>(R"(request_ids: ["one", "unknown"])"), &response).ok());
  EXPECT_EQ(response.aborted(), 1);
  const Heard heard = HearOut(*reader);
  EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(heard.text(), "a");
}

// A unary call without generated code; health and reflection come from gRPC's libraries without headers.
grpc::Status CallRaw(const std::shared_ptr<grpc::Channel>& channel, const std::string& method, const std::string& request,
                     std::string& response) {
  grpc::GenericStub stub(channel);
  grpc::CompletionQueue queue;
  grpc::ClientContext context;
  const grpc::Slice slice(request);
  const grpc::ByteBuffer bytes(&slice, 1);
  auto call = stub.PrepareUnaryCall(&context, method, bytes, &queue);
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->StartCall();
  call->Finish(&answer, &status, &queue);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  std::vector<grpc::Slice> slices;
  if (status.ok() && answer.Dump(&slices).ok()) {
    for (const grpc::Slice& part : slices) response.append(reinterpret_cast<const char*>(part.begin()), part.size());
  }
  return status;
}

TEST_F(ServiceTest, TextThatIsNotUtf8IsRefusedAndTheServerGoesOn) {
  std::string response;
  // GenerateRequest.text, field 3: one byte that begins no character.
  EXPECT_FALSE(CallRaw(channel_, "/memserve.v1.Inference/Tokenize", "\x0a\x01\xff", response).ok());
  engine_->on_generate = [this](const FakeEngine::Generation& generation) { engine_->End(generation, engine::Finished{}); };
  EXPECT_TRUE(Generate(*stub_, Ask("x")).status.ok());
}

TEST_F(ServiceTest, BytesThatAreNoMessageAndUnknownMethodsAreRefusedAndTheServerGoesOn) {
  std::string response;
  EXPECT_FALSE(CallRaw(channel_, "/memserve.v1.Inference/GetModel", "\xff\xff\xff", response).ok());
  EXPECT_EQ(CallRaw(channel_, "/memserve.v1.Inference/Nothing", "", response).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(CallRaw(channel_, "/memserve.v1.Inference/Tokenize", std::string(9 << 20, 'x'), response).error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  grpc::ClientContext call;
  v1::GetModelResponse model;
  EXPECT_TRUE(stub_->GetModel(&call, {}, &model).ok());
}

TEST_F(ServiceTest, ReflectionListsTheServices) {
  // The reflection library has these messages compiled in; only their headers are missing.
  const auto* pool = google::protobuf::DescriptorPool::generated_pool();
  auto* factory = google::protobuf::MessageFactory::generated_factory();
  const auto* asked = pool->FindMessageTypeByName("grpc.reflection.v1alpha.ServerReflectionRequest");
  const auto* answered = pool->FindMessageTypeByName("grpc.reflection.v1alpha.ServerReflectionResponse");
  ASSERT_NE(asked, nullptr);
  ASSERT_NE(answered, nullptr);
  std::unique_ptr<google::protobuf::Message> request(factory->GetPrototype(asked)->New());
  request->GetReflection()->SetString(request.get(), asked->FindFieldByName("list_services"), "*");
  std::string bytes;
  // The method streams both ways; one message each way has the form of a unary call.
  const grpc::Status status =
      CallRaw(channel_, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", request->SerializeAsString(), bytes);
  ASSERT_TRUE(status.ok()) << status.error_message();
  std::unique_ptr<google::protobuf::Message> response(factory->GetPrototype(answered)->New());
  ASSERT_TRUE(response->ParseFromString(bytes));
  for (const char* name : {"memserve.v1.Inference", "memserve.v1.Memory", "grpc.health.v1.Health"}) {
    EXPECT_THAT(response->DebugString(), HasSubstr(absl::StrCat("name: \"", name, "\"")));
  }
}

}  // namespace
}  // namespace memserve::server
