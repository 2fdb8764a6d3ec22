// The real engine behind the real server: the golden cases' greedy tokens through gRPC, and the memserve program itself.
#include <csignal>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/server/harness.h"
#include "tests/server/program.h"
#include "tests/support/golden.h"

namespace memserve::server {
namespace {

using ::testing::HasSubstr;

class GoldenEndToEndTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    golden_ = testing::LoadGolden(GetParam());
    auto engine = engine::Engine::Create(testing::ParityOptions(golden_.checkpoint));
    ASSERT_TRUE(engine.ok()) << engine.status();
    auto server = Server::Listen(OnAnyPort());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_TRUE(server_->Serve(*std::move(engine)).ok());
    stub_ = v1::Inference::NewStub(Connect(server_->port()));
  }

  static v1::GenerateRequest Greedy(const testing::GoldenSequence& sequence) {
    v1::GenerateRequest request;
    request.mutable_tokens()->mutable_ids()->Assign(sequence.tokens.begin(), sequence.tokens.end());
    request.mutable_sampling()->set_temperature(0);
    request.mutable_stop()->set_ignore_eos(true);
    request.mutable_stop()->set_max_tokens(static_cast<int>(sequence.greedy_tokens.size()));
    request.mutable_output()->set_logprobs(true);
    return request;
  }

  std::vector<testing::GoldenSequence> GreedySequences() const {
    std::vector<testing::GoldenSequence> sequences;
    for (const testing::GoldenSequence& sequence : golden_.sequences) {
      if (!sequence.greedy_tokens.empty()) sequences.push_back(sequence);
    }
    return sequences;
  }

  testing::GoldenCase golden_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

TEST_P(GoldenEndToEndTest, GreedyTokensAloneAndAllAtOnceAreTheReferences) {
  const std::vector<testing::GoldenSequence> sequences = GreedySequences();
  ASSERT_FALSE(sequences.empty());
  std::vector<Heard> alone;
  for (const testing::GoldenSequence& sequence : sequences) {
    SCOPED_TRACE(sequence.name);
    alone.push_back(Generate(*stub_, Greedy(sequence)));
    ASSERT_TRUE(alone.back().status.ok()) << alone.back().status.error_message();
    EXPECT_EQ(alone.back().token_ids(), sequence.greedy_tokens);
    EXPECT_EQ(alone.back().finished.at(0).reason(), v1::FINISH_REASON_LENGTH);
    EXPECT_EQ(alone.back().finished.at(0).usage().completion_tokens(), static_cast<int>(sequence.greedy_tokens.size()));
  }

  constexpr size_t kTimes = 4;  // each sequence, so that a batch is full
  std::vector<Heard> together(kTimes * sequences.size());
  std::vector<std::thread> clients;
  for (size_t i = 0; i < together.size(); ++i) {
    clients.emplace_back([&, i] { together[i] = Generate(*stub_, Greedy(sequences[i % sequences.size()])); });
  }
  for (std::thread& client : clients) client.join();
  for (size_t i = 0; i < together.size(); ++i) {
    const Heard& lone = alone[i % sequences.size()];
    SCOPED_TRACE(sequences[i % sequences.size()].name);
    ASSERT_TRUE(together[i].status.ok()) << together[i].status.error_message();
    EXPECT_EQ(together[i].token_ids(), lone.token_ids());
    std::vector<float> logprobs, lone_logprobs;
    for (const v1::Delta& delta : together[i].deltas)
      logprobs.insert(logprobs.end(), delta.logprobs().begin(), delta.logprobs().end());
    for (const v1::Delta& delta : lone.deltas)
      lone_logprobs.insert(lone_logprobs.end(), delta.logprobs().begin(), delta.logprobs().end());
    EXPECT_EQ(logprobs, lone_logprobs);  // bit for bit
  }
}

TEST_P(GoldenEndToEndTest, TextsGiveTheReferencesTokensAndContinuations) {
  int texts = 0;
  for (const testing::GoldenSequence& sequence : GreedySequences()) {
    if (!sequence.text) continue;
    SCOPED_TRACE(sequence.name);
    grpc::ClientContext context;
    v1::TokenizeRequest tokenize;
    tokenize.set_text(*sequence.text);
    tokenize.set_add_bos(true);
    v1::TokenizeResponse ids;
    ASSERT_TRUE(stub_->Tokenize(&context, tokenize, &ids).ok());
    EXPECT_EQ(std::vector<int32_t>(ids.token_ids().begin(), ids.token_ids().end()), sequence.tokens);
    v1::GenerateRequest request = Greedy(sequence);
    request.set_text(*sequence.text);
    EXPECT_EQ(Generate(*stub_, request).token_ids(), sequence.greedy_tokens);
    ++texts;
  }
  EXPECT_GT(texts, 0);
}

TEST_P(GoldenEndToEndTest, ScoresAreTheReferencesLogLikelihoods) {
  for (const testing::GoldenSequence& sequence : golden_.sequences) {
    if (sequence.tokens.size() < 2) continue;
    SCOPED_TRACE(sequence.name);
    const size_t cut = sequence.tokens.size() / 2;
    v1::ScoreRequest request;
    request.mutable_tokens()->mutable_ids()->Assign(sequence.tokens.begin(), sequence.tokens.begin() + cut);
    request.add_continuations()->mutable_tokens()->mutable_ids()->Assign(sequence.tokens.begin() + cut, sequence.tokens.end());
    grpc::ClientContext context;
    v1::ScoreResponse response;
    const grpc::Status status = stub_->Score(&context, request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    double expected = 0;
    for (size_t i = cut; i < sequence.tokens.size(); ++i) expected += sequence.loglikelihood[i - 1];
    EXPECT_NEAR(response.scores(0).logprob(), expected, 1e-3);
    EXPECT_EQ(response.scores(0).token_logprobs_size(), static_cast<int>(sequence.tokens.size() - cut));
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenEndToEndTest, ::testing::ValuesIn(testing::GoldenNames()),
                         [](const auto& info) { return info.param; });

// --- the program

constexpr char kCheckpoint[] = MEMSERVE_GOLDEN_DIR "/A/checkpoint";

class ProgramTest : public ::testing::Test {
 protected:
  // Starts memserve and returns once it is ready.
  std::unique_ptr<Program> Serve(std::vector<std::string> flags = {}) {
    const std::string port_file =
        absl::StrCat(::testing::TempDir(), "/memserve_port_", getpid(), "_", ::testing::UnitTest::GetInstance()->random_seed());
    std::remove(port_file.c_str());
    flags.insert(flags.begin(), {MEMSERVE, absl::StrCat("--checkpoint=", kCheckpoint), "--grpc_address=127.0.0.1:0",
                                 absl::StrCat("--port_file=", port_file)});
    auto program = std::make_unique<Program>(std::move(flags));
    const absl::Time limit = absl::Now() + absl::Seconds(60);
    while (absl::Now() < limit && !(std::ifstream(port_file) >> port_)) std::this_thread::yield();
    std::remove(port_file.c_str());
    EXPECT_NE(port_, 0);
    return program;
  }

  // Its whole life, for one that does not start.
  std::string Refusal(std::vector<std::string> flags) {
    flags.insert(flags.begin(), MEMSERVE);
    Program program(std::move(flags));
    EXPECT_EQ(program.ExitStatus(), 1);
    EXPECT_EQ(program.out(), "");
    return program.error();
  }

  int port_ = 0;
};

size_t Lines(const std::string& text) { return std::count(text.begin(), text.end(), '\n'); }

TEST_F(ProgramTest, AStopSignalDrainsAndEndsWithZero) {
  auto program = Serve();
  const auto stub = v1::Inference::NewStub(Connect(port_));
  v1::GenerateRequest request = Ask("x");
  request.mutable_stop()->set_max_tokens(100);
  request.mutable_stop()->set_ignore_eos(true);
  grpc::ClientContext context;
  auto reader = stub->Generate(&context, request);
  v1::GenerateResponse first;
  ASSERT_TRUE(reader->Read(&first));
  program->Signal(SIGTERM);
  const Heard rest = HearOut(*reader);
  EXPECT_TRUE(rest.status.ok()) << rest.status.error_message();
  EXPECT_EQ(rest.finished.at(0).usage().completion_tokens(), 100);
  EXPECT_EQ(program->ExitStatus(), 0) << program->error();
  EXPECT_THAT(program->error(), HasSubstr("drained"));
}

TEST_F(ProgramTest, ASecondSignalCutsTheDrainShort) {
  // Work for minutes: long streams on the slow back end.
  auto program = Serve({"--drain_seconds=3600", "--backend=reference"});
  const auto stub = v1::Inference::NewStub(Connect(port_));
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>>> readers;
  for (int i = 0; i < 400; ++i) {
    v1::GenerateRequest request = Ask("x");
    request.mutable_stop()->set_ignore_eos(true);
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    readers.push_back(stub->Generate(contexts.back().get(), request));
  }
  v1::GenerateResponse message;
  ASSERT_TRUE(readers[0]->Read(&message));
  program->Signal(SIGINT);
  ASSERT_TRUE(program->ReadErrorUntil("draining"));
  program->Signal(SIGINT);
  EXPECT_EQ(program->ExitStatus(), 0) << program->error();
  EXPECT_EQ(HearOut(*readers.back()).status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(ProgramTest, JsonLogsAreOneObjectALine) {
  auto program = Serve({"--log_json"});
  program->Signal(SIGTERM);
  EXPECT_EQ(program->ExitStatus(), 0);
  const std::string& log = program->error();
  EXPECT_GE(Lines(log), 3u);
  for (size_t begin = 0, end; (end = log.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const nlohmann::json line = nlohmann::json::parse(log.substr(begin, end - begin));
    EXPECT_TRUE(line.contains("time") && line.contains("level") && line.contains("message")) << line;
  }
}

TEST_F(ProgramTest, APortInUseIsOneLine) {
  auto program = Serve();
  const std::string address = absl::StrCat("127.0.0.1:", port_);
  const std::string refusal = Refusal({absl::StrCat("--checkpoint=", kCheckpoint), "--grpc_address=" + address});
  EXPECT_EQ(Lines(refusal), 1u) << refusal;
  EXPECT_THAT(refusal, HasSubstr(address));
  EXPECT_THAT(refusal, HasSubstr("in use"));
}

TEST_F(ProgramTest, ABadFlagIsOneLine) {
  for (const char* flag :
       {"--nonsense", "--threads=many", "--devices=x", "--grpc_address=0.0.0.0:0", "--drain_seconds=-1", "stray"}) {
    const std::string refusal = Refusal({absl::StrCat("--checkpoint=", kCheckpoint), flag});
    EXPECT_EQ(Lines(refusal), 1u) << refusal;
  }
}

TEST_F(ProgramTest, ABadCheckpointIsOneLine) {
  for (const char* folder : {"/nowhere", MEMSERVE_GOLDEN_DIR}) {
    const std::string refusal = Refusal({absl::StrCat("--checkpoint=", folder), "--grpc_address=127.0.0.1:0"});
    EXPECT_EQ(Lines(refusal), 1u) << refusal;
    EXPECT_THAT(refusal, HasSubstr(folder));
  }
  EXPECT_THAT(Refusal({}), HasSubstr("--checkpoint"));
}

TEST_F(ProgramTest, DryRunPrintsThePlanAndEnds) {
  Program program({MEMSERVE, absl::StrCat("--checkpoint=", kCheckpoint), "--dry_run"});
  EXPECT_EQ(program.ExitStatus(), 0);
  EXPECT_THAT(program.error(), HasSubstr("plan"));
}

TEST_F(ProgramTest, HelpIsCompleteAndEndsWithZero) {
  Program program({MEMSERVE, "--help"});
  EXPECT_EQ(program.ExitStatus(), 0);
  for (const char* flag :
       {"checkpoint",         "model_name",       "backend",       "devices",       "threads",          "isa",
        "weight_dtype",       "activation_dtype", "table_dtype",   "kv_dtype",      "kv_cache_bytes",   "kv_page_size",
        "max_context_tokens", "max_batch_tokens", "max_sequences", "max_waiting",   "max_prompt_bytes", "dry_run",
        "memory_limit_bytes", "grpc_address",     "port_file",     "drain_seconds", "stall_seconds",    "convert_cache",
        "max_message_bytes",  "max_unread_bytes", "log_json",      "log_level",     "log_load_seconds", "kv_cache_fraction",
        "allow_public",       "flagfile"}) {
    EXPECT_THAT(program.out(), HasSubstr(absl::StrCat("  --", flag)));
  }
}

TEST_F(ProgramTest, FlagsComeFromAFileToo) {
  const std::string file = absl::StrCat(::testing::TempDir(), "/memserve_flags_", getpid());
  std::ofstream(file) << "--checkpoint=" << kCheckpoint << "\n--dry_run\n";
  Program program({MEMSERVE, "--flagfile=" + file});
  EXPECT_EQ(program.ExitStatus(), 0) << program.error();
  std::remove(file.c_str());
}

}  // namespace
}  // namespace memserve::server
