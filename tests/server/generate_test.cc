// One stream from the engine's mouth to the client's ear.
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/fake_engine.h"
#include "tests/server/harness.h"

namespace memserve::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class GenerateTest : public ::testing::Test {
 protected:
  void SetUp() override { Start(OnAnyPort()); }

  void Start(const ServerOptions& options) {
    server_.reset();
    auto engine = std::make_unique<FakeEngine>();
    engine_ = engine.get();
    auto server = Server::Listen(options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_TRUE(server_->Serve(std::move(engine)).ok());
    stub_ = v1::Inference::NewStub(Connect(server_->port()));
  }

  // A message far beyond what gRPC takes ahead of its reader, so that its write stays in flight until the client reads.
  static engine::Delta Blocking() { return {.text = std::string(2 << 20, 'x')}; }

  FakeEngine* engine_ = nullptr;
  std::unique_ptr<Server> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

TEST_F(GenerateTest, DeltasArriveInOrderAndFinishedIsLast) {
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("Hello"));
  const FakeEngine::Generation generation = engine_->NextGeneration();
  EXPECT_EQ(std::get<std::string>(generation.request.prompt), "Hello");
  for (int i = 0; i < 200; ++i) {
    generation.listener->OnDelta({.text = absl::StrCat(i, " "), .token_ids = {i}, .logprobs = {-0.5f * i}});
  }
  engine_->End(generation, engine::Finished{.reason = engine::FinishReason::kStop,
                                            .text = "end",
                                            .stop_string = "stop",
                                            .usage = {.prompt_tokens = 6, .cached_tokens = 2, .completion_tokens = 200},
                                            .timings = {absl::Milliseconds(1), absl::Milliseconds(20), absl::Milliseconds(300)},
                                            .seed = ~uint64_t{0}});
  const Heard heard = HearOut(*reader);
  ASSERT_TRUE(heard.status.ok()) << heard.status.error_message();
  std::string text;
  std::vector<int32_t> ids;
  for (int i = 0; i < 200; ++i) {
    absl::StrAppend(&text, i, " ");
    ids.push_back(i);
  }
  EXPECT_EQ(heard.text(), text + "end");
  EXPECT_EQ(heard.token_ids(), ids);
  size_t logprobs = 0;
  for (const v1::Delta& delta : heard.deltas) {
    EXPECT_EQ(delta.logprobs_size(), delta.token_ids_size());
    for (const float logprob : delta.logprobs()) EXPECT_EQ(logprob, -0.5f * static_cast<float>(logprobs++));
  }
  ASSERT_EQ(heard.finished.size(), 1u);
  const v1::Finished& end = heard.finished[0];
  EXPECT_EQ(end.reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(end.stop_string(), "stop");
  EXPECT_EQ(end.usage().prompt_tokens(), 6);
  EXPECT_EQ(end.usage().cached_tokens(), 2);
  EXPECT_EQ(end.usage().completion_tokens(), 200);
  EXPECT_DOUBLE_EQ(end.timings().queue_seconds(), 0.001);
  EXPECT_DOUBLE_EQ(end.timings().prefill_seconds(), 0.02);
  EXPECT_DOUBLE_EQ(end.timings().decode_seconds(), 0.3);
  EXPECT_EQ(end.seed(), ~uint64_t{0});
  EXPECT_EQ(end.request_id(), generation.request.id);
  EXPECT_THAT(engine_->cancelled(), IsEmpty());
}

TEST_F(GenerateTest, ADeltaReachesTheClientBeforeTheNextOneExists) {
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("x"));
  const FakeEngine::Generation generation = engine_->NextGeneration();
  v1::GenerateResponse message;
  for (const char* text : {"one", "two", "three"}) {
    generation.listener->OnDelta({.text = text});
    ASSERT_TRUE(reader->Read(&message));
    EXPECT_EQ(message.delta().text(), text);
  }
  engine_->End(generation, engine::Finished{});
  EXPECT_TRUE(HearOut(*reader).status.ok());
}

TEST_F(GenerateTest, DeltasThatWaitForASlowReaderAreJoined) {
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("x"));
  const FakeEngine::Generation generation = engine_->NextGeneration();
  generation.listener->OnDelta(Blocking());
  for (int i = 0; i < 100; ++i) generation.listener->OnDelta({.text = "y", .token_ids = {i}, .token_bytes = {"y"}});
  engine_->End(generation, engine::Finished{.reason = engine::FinishReason::kLength});
  const Heard heard = HearOut(*reader);
  ASSERT_TRUE(heard.status.ok()) << heard.status.error_message();
  ASSERT_EQ(heard.deltas.size(), 2u);
  EXPECT_EQ(heard.deltas[1].text(), std::string(100, 'y'));
  EXPECT_EQ(heard.deltas[1].token_ids_size(), 100);
  EXPECT_EQ(heard.deltas[1].token_bytes_size(), 100);
  ASSERT_EQ(heard.finished.size(), 1u);
  EXPECT_EQ(heard.finished[0].reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(GenerateTest, JoinedMessagesStayFarBelowWhatClientsAcceptByDefault) {
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("x"));
  const FakeEngine::Generation generation = engine_->NextGeneration();
  generation.listener->OnDelta(Blocking());
  for (int i = 0; i < 300; ++i) generation.listener->OnDelta({.text = std::string(10'000, 'y')});  // 3 MB
  engine_->End(generation, engine::Finished{});
  const Heard heard = HearOut(*reader);
  ASSERT_TRUE(heard.status.ok()) << heard.status.error_message();
  EXPECT_EQ(heard.text().size(), (2u << 20) + 3'000'000u);
  for (size_t i = 1; i < heard.deltas.size(); ++i) EXPECT_LE(heard.deltas[i].ByteSizeLong(), 300'000u);
}

TEST_F(GenerateTest, AReaderThatLeavesTooMuchUnreadIsEndedAndItsRequestCancelled) {
  ServerOptions options = OnAnyPort();
  options.max_unread_bytes = 100'000;
  Start(options);
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("x"));
  const FakeEngine::Generation generation = engine_->NextGeneration();
  generation.listener->OnDelta(Blocking());
  generation.listener->OnDelta({.text = std::string(99'000, 'y')});
  EXPECT_THAT(engine_->cancelled(), IsEmpty());
  generation.listener->OnDelta({.text = std::string(2'000, 'z')});
  EXPECT_THAT(engine_->cancelled(), ElementsAre(generation.request.id));
  generation.listener->OnDelta({.text = "too late"});
  const Heard heard = HearOut(*reader);
  EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(heard.status.error_message(), HasSubstr("100000 bytes"));
  EXPECT_FALSE(RetrySeconds(heard.status).has_value());
  EXPECT_EQ(heard.text().size(), Blocking().text.size());
  EXPECT_THAT(heard.finished, IsEmpty());
}

TEST_F(GenerateTest, AClientThatCancelsCancelsItsRequest) {
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("x"));
  const FakeEngine::Generation generation = engine_->NextGeneration();
  generation.listener->OnDelta({.text = "a"});
  context.TryCancel();
  EXPECT_TRUE(engine_->WaitForCancel(generation.request.id));
  EXPECT_EQ(HearOut(*reader).status.error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(GenerateTest, TheEngineMaySpeakOnAfterTheClientHasLeft) {
  engine_->ends_what_is_cancelled = false;
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("x"));
  FakeEngine::Generation generation = engine_->NextGeneration();
  context.TryCancel();
  ASSERT_TRUE(engine_->WaitForCancel(generation.request.id));
  EXPECT_EQ(HearOut(*reader).status.error_code(), grpc::StatusCode::CANCELLED);
  for (int i = 0; i < 100; ++i) generation.listener->OnDelta({.text = "late"});
  engine_->End(generation, absl::CancelledError("cancelled"));
  std::weak_ptr<engine::GenerateListener> reactor = generation.listener;
  generation.listener.reset();
  server_.reset();
  EXPECT_TRUE(reactor.expired());
}

TEST_F(GenerateTest, TheReactorGoesWhenTheStreamHasEndedAndTheEngineLetsGo) {
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("x"));
  FakeEngine::Generation generation = engine_->NextGeneration();
  engine_->End(generation, engine::Finished{});
  EXPECT_TRUE(HearOut(*reader).status.ok());
  std::weak_ptr<engine::GenerateListener> reactor = generation.listener;
  server_.reset();  // waits for gRPC's share
  EXPECT_FALSE(reactor.expired());
  generation.listener.reset();
  EXPECT_TRUE(reactor.expired());
}

TEST_F(GenerateTest, TheClientsDeadlineReachesTheEngineAndEndsTheStream) {
  grpc::ClientContext context;
  const auto deadline = std::chrono::system_clock::now() + std::chrono::milliseconds(300);
  context.set_deadline(deadline);
  auto reader = stub_->Generate(&context, Ask("x"));
  const FakeEngine::Generation generation = engine_->NextGeneration();
  EXPECT_LT(absl::AbsDuration(generation.request.deadline - absl::FromChrono(deadline)), absl::Milliseconds(250));
  EXPECT_EQ(HearOut(*reader).status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(engine_->WaitForCancel(generation.request.id));
}

TEST_F(GenerateTest, WithoutADeadlineTheEngineSeesNone) {
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("x"));
  const FakeEngine::Generation generation = engine_->NextGeneration();
  EXPECT_EQ(generation.request.deadline, absl::InfiniteFuture());
  engine_->End(generation, engine::Finished{});
  HearOut(*reader);
}

TEST_F(GenerateTest, TokensBeforeAnErrorArriveBeforeIt) {
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Ask("x"));
  const FakeEngine::Generation generation = engine_->NextGeneration();
  generation.listener->OnDelta(Blocking());
  generation.listener->OnDelta({.text = "tail"});
  engine_->End(generation, absl::DeadlineExceededError("the deadline passed after 7 tokens"));
  const Heard heard = HearOut(*reader);
  EXPECT_EQ(heard.text().substr(Blocking().text.size()), "tail");
  EXPECT_EQ(heard.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(heard.status.error_message(), "the deadline passed after 7 tokens");
}

TEST_F(GenerateTest, AnEngineThatAnswersWithinTheCallIsHeard) {
  engine_->on_generate = [this](const FakeEngine::Generation& generation) {
    generation.listener->OnDelta({.text = "at "});
    generation.listener->OnDelta({.text = "once"});
    engine_->End(generation, engine::Finished{});
  };
  for (int i = 0; i < 50; ++i) {
    const Heard heard = Generate(*stub_, Ask("x"));
    ASSERT_TRUE(heard.status.ok()) << heard.status.error_message();
    EXPECT_EQ(heard.text(), "at once");
    EXPECT_EQ(heard.finished.size(), 1u);
  }
}

TEST_F(GenerateTest, LeavingADuplicateDoesNotCancelTheOneThatRuns) {
  v1::GenerateRequest request = Ask("x");
  request.set_request_id("twin");
  grpc::ClientContext first_context;
  auto first = stub_->Generate(&first_context, request);
  const FakeEngine::Generation generation = engine_->NextGeneration();
  EXPECT_EQ(Generate(*stub_, request).status.error_code(), grpc::StatusCode::ALREADY_EXISTS);

  engine_->refuses_late = true;
  grpc::ClientContext second_context;
  auto second = stub_->Generate(&second_context, request);
  ASSERT_TRUE(engine_->WaitForRefusals(1));
  second_context.TryCancel();
  // This follows the cancellation on the same connection.
  grpc::ClientContext third_context;
  v1::GetLoadResponse load;
  ASSERT_TRUE(stub_->GetLoad(&third_context, {}, &load).ok());
  engine_->SpeakRefusals();
  second->Finish();

  generation.listener->OnDelta({.text = "alive"});
  engine_->End(generation, engine::Finished{});
  EXPECT_EQ(HearOut(*first).text(), "alive");
  EXPECT_THAT(engine_->cancelled(), IsEmpty());
}

TEST_F(GenerateTest, ManyStreamsAtOnceKeepTheirTokensApart) {
  // The engine's side: one thread that speaks to all, as the real one has.
  constexpr int kStreams = 32, kTokens = 100;
  std::thread speaker([this] {
    std::vector<FakeEngine::Generation> generations;
    for (int i = 0; i < kStreams; ++i) generations.push_back(engine_->NextGeneration());
    for (int token = 0; token < kTokens; ++token) {
      for (const auto& generation : generations) {
        generation.listener->OnDelta({.text = std::get<std::string>(generation.request.prompt), .token_ids = {token}});
      }
    }
    for (const auto& generation : generations) engine_->End(generation, engine::Finished{});
  });
  std::vector<Heard> heard(kStreams);
  std::vector<std::thread> clients;
  for (int i = 0; i < kStreams; ++i) {
    clients.emplace_back([this, i, &heard] { heard[i] = Generate(*stub_, Ask(std::string(1, static_cast<char>('A' + i)))); });
  }
  for (std::thread& client : clients) client.join();
  speaker.join();
  for (int i = 0; i < kStreams; ++i) {
    EXPECT_TRUE(heard[i].status.ok()) << heard[i].status.error_message();
    EXPECT_EQ(heard[i].text(), std::string(kTokens, static_cast<char>('A' + i)));
    EXPECT_EQ(heard[i].token_ids().size(), static_cast<size_t>(kTokens));
  }
}

}  // namespace
}  // namespace memserve::server
