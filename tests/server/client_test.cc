// The real memserve-client against a server in this process.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/retry_after.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/server/fake_engine.h"
#include "tests/server/harness.h"
#include "tests/server/program.h"

namespace memserve::server {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class ClientTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto engine = std::make_unique<FakeEngine>();
    engine_ = engine.get();
    auto server = Server::Listen(OnAnyPort());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_TRUE(server_->Serve(std::move(engine)).ok());
  }

  std::unique_ptr<Program> Start(std::vector<std::string> words) {
    words.insert(words.begin(), {MEMSERVE_CLIENT, absl::StrCat("--address=127.0.0.1:", server_->port())});
    return std::make_unique<Program>(std::move(words));
  }
  std::unique_ptr<Program> Run(std::vector<std::string> words) {
    auto program = Start(std::move(words));
    program->CloseInput();
    status_ = program->ExitStatus();
    return program;
  }

  void AnswerWith(std::vector<engine::Delta> deltas, engine::Finished finished) {
    engine_->on_generate = [this, deltas, finished](const FakeEngine::Generation& generation) {
      for (const engine::Delta& delta : deltas) generation.listener->OnDelta(delta);
      engine_->End(generation, finished);
    };
  }

  FakeEngine* engine_ = nullptr;
  std::unique_ptr<Server> server_;
  int status_ = -1;
};

TEST_F(ClientTest, CompleteStreamsTextAsItComes) {
  auto program = Start({"complete", "The capital of Peru is", "--stats"});
  const FakeEngine::Generation generation = engine_->NextGeneration();
  EXPECT_EQ(std::get<std::string>(generation.request.prompt), "The capital of Peru is");
  generation.listener->OnDelta({.text = " Li"});
  ASSERT_TRUE(program->ReadUntil(" Li"));
  generation.listener->OnDelta({.text = "ma"});
  ASSERT_TRUE(program->ReadUntil(" Lima"));
  engine_->End(generation, engine::Finished{.text = ".", .stop_token_id = 257, .usage = {.prompt_tokens = 23}, .seed = 77});
  EXPECT_EQ(program->ExitStatus(), 0);
  EXPECT_EQ(program->out(), " Lima.\n");
  EXPECT_THAT(program->error(), HasSubstr("23 prompt tokens"));
  EXPECT_THAT(program->error(), HasSubstr("stop token 257"));
  EXPECT_THAT(program->error(), HasSubstr("seed 77"));
}

TEST_F(ClientTest, FlagsReachTheEngine) {
  auto program = Start({"complete", "--max_tokens=5", "--temperature", "0.5", "--top_k=7", "--top_p=0.25",
                        "--seed=18446744073709551615", "--stop=A", "--stop", "B", "--memory=off", "--add_bos=off",
                        "--ignore_eos=on", "--model=fake", "--request_id=r", "--", "--x"});
  const FakeEngine::Generation generation = engine_->NextGeneration();
  const engine::GenerateRequest& request = generation.request;
  EXPECT_EQ(std::get<std::string>(request.prompt), "--x");
  EXPECT_EQ(request.stop.max_tokens, 5);
  EXPECT_EQ(request.sampling.temperature, 0.5f);
  EXPECT_EQ(request.sampling.top_k, 7);
  EXPECT_EQ(request.sampling.top_p, 0.25f);
  EXPECT_EQ(request.sampling.seed, ~uint64_t{0});
  EXPECT_THAT(request.stop.strings, ::testing::ElementsAre("A", "B"));
  EXPECT_FALSE(request.memory.enabled);
  EXPECT_EQ(request.add_bos, false);
  EXPECT_TRUE(request.stop.ignore_eos);
  EXPECT_EQ(request.id, "r");
  engine_->End(generation, engine::Finished{});
  EXPECT_EQ(program->ExitStatus(), 0);
  EXPECT_EQ(program->error(), "");
}

TEST_F(ClientTest, AChatKeepsWhatWasSaid) {
  engine_->model_info.chat = true;
  auto program = Start({"chat", "--system=Be brief.", "--max_tokens=9"});
  program->Write("Hello\n");
  FakeEngine::Generation generation = engine_->NextGeneration();
  const auto said = [&] {
    std::string all;
    for (const engine::ChatMessage& message : std::get<engine::Chat>(generation.request.prompt).messages) {
      all += message.role + ":" + message.content + ";";
    }
    return all;
  };
  EXPECT_EQ(said(), "system:Be brief.;user:Hello;");
  EXPECT_EQ(generation.request.stop.max_tokens, 9);
  generation.listener->OnDelta({.text = "Hi th"});
  ASSERT_TRUE(program->ReadUntil("Hi th"));
  engine_->End(generation, engine::Finished{.text = "ere."});
  ASSERT_TRUE(program->ReadUntil("ere.\n"));
  program->Write("\nAnd?\n");
  generation = engine_->NextGeneration();
  EXPECT_EQ(said(), "system:Be brief.;user:Hello;assistant:Hi there.;user:And?;");
  engine_->End(generation, engine::Finished{.text = "Bye."});
  program->CloseInput();
  EXPECT_EQ(program->ExitStatus(), 0);
  EXPECT_EQ(program->out(), "Hi there.\nBye.\n");
  EXPECT_EQ(program->error(), "");
}

TEST_F(ClientTest, CompleteSendsOneMessageAsAChat) {
  engine_->model_info.chat = true;
  auto program = Start({"complete", "--chat", "--system=S", "Hello"});
  const FakeEngine::Generation generation = engine_->NextGeneration();
  const engine::Chat& chat = std::get<engine::Chat>(generation.request.prompt);
  ASSERT_EQ(chat.messages.size(), 2u);
  EXPECT_EQ(chat.messages[0].content, "S");
  EXPECT_EQ(chat.messages[1].role, "user");
  EXPECT_TRUE(chat.add_generation_prompt);
  engine_->End(generation, engine::Finished{});
  EXPECT_EQ(program->ExitStatus(), 0);
}

TEST_F(ClientTest, ADashReadsThePromptFromStandardInput) {
  auto program = Start({"complete", "-"});
  program->Write("two\nlines\n");
  program->CloseInput();
  const FakeEngine::Generation generation = engine_->NextGeneration();
  EXPECT_EQ(std::get<std::string>(generation.request.prompt), "two\nlines\n");
  engine_->End(generation, engine::Finished{});
  EXPECT_EQ(program->ExitStatus(), 0);
}

TEST_F(ClientTest, TokenIdsGoInAndComeOut) {
  AnswerWith({{.token_ids = {5, 6}}, {.token_ids = {7}}}, {});
  const auto program = Run({"complete", "--token_ids", "1, 2 3"});
  EXPECT_EQ(status_, 0);
  EXPECT_EQ(program->out(), "5\n6\n7\n");
}

TEST_F(ClientTest, LogprobsAreALinePerToken) {
  AnswerWith({{.text = "a\n", .token_ids = {5, 6}, .logprobs = {-0.5, -1.25}, .token_bytes = {"a", "\n"}}}, {});
  const auto program = Run({"complete", "--logprobs", "x"});
  EXPECT_EQ(program->out(), "-0.5000\t5\t\"a\"\n-1.2500\t6\t\"\\n\"\n");
}

TEST_F(ClientTest, JsonIsOneObjectALine) {
  AnswerWith({{.text = "é", .token_ids = {5}, .logprobs = {-0.1f}, .token_bytes = {"\xff\x01"}}},
             {.reason = engine::FinishReason::kLength, .seed = ~uint64_t{0}});
  const auto program = Run({"complete", "--json", "--request_id=r", "x"});
  EXPECT_EQ(status_, 0);
  const std::string& out = program->out();
  const size_t end = out.find('\n');
  EXPECT_EQ(
      out.substr(0, end),
      R"({"delta":{"text":"é","token_ids":[5],"logprobs":[-0.1],"token_bytes":["/wE="],"top_logprobs":[],"choice":0,"chosen_logprobs":[],"memory_traces":[]}})");
  const nlohmann::json finished = nlohmann::json::parse(out.substr(end)).at("finished");
  EXPECT_EQ(finished.at("reason"), "FINISH_REASON_LENGTH");
  EXPECT_EQ(finished.at("seed").get<uint64_t>(), ~uint64_t{0});
  EXPECT_FALSE(finished.contains("stop_string"));
}

TEST_F(ClientTest, ScorePrintsALinePerContinuation) {
  std::thread engine([this] {
    const FakeEngine::Scoring scoring = engine_->NextScoring();
    EXPECT_EQ(std::get<std::string>(scoring.request.context), "ctx");
    scoring.callback(engine::ScoreResult{.scores = {{.logprob = -1.5, .is_greedy = true}, {.logprob = -20, .is_greedy = false}}});
  });
  const auto program = Run({"score", "ctx", " yes", " no"});
  engine.join();
  EXPECT_EQ(status_, 0);
  EXPECT_EQ(program->out(), "-1.5000\tgreedy\t yes\n-20.0000\t-\t no\n");
}

TEST_F(ClientTest, TheQueriesPrintWhatTheServerSays) {
  EXPECT_EQ(Run({"tokenize", "Hi", "--add_bos=on"})->out(), "256 72 105\n");
  EXPECT_EQ(Run({"tokenize", "Hi", "--allow_special"})->out(), "72 105 256\n");
  EXPECT_EQ(Run({"detokenize", "72", "105"})->out(), "Hi\n");
  EXPECT_THAT(Run({"model"})->out(), StartsWith("model: fake\narchitecture: memory_llama\nvocab_size: 300\n"));
  engine_->load_now.waiting = 9;
  EXPECT_THAT(Run({"load"})->out(), HasSubstr("waiting: 9\n"));
  EXPECT_EQ(nlohmann::json::parse(Run({"load", "--json"})->out()).at("waiting"), 9);
  EXPECT_THAT(Run({"tables"})->out(), HasSubstr("layers.1.feed_forward.values.weight  layers [1,4]  rows 1048576"));
  EXPECT_EQ(Run({"abort", "nobody"})->out(), "aborted: 0\n");
  EXPECT_EQ(status_, 0);
}

TEST_F(ClientTest, MemoryFlagsReachTheEngine) {
  auto program = Start({"complete", "x", "--memory_knn=3", "--memory_layers=1,4", "--masked_rows=7,1000", "--trace",
                        "--trace_entries=2", "--trace_tokens=5"});
  const FakeEngine::Generation generation = engine_->NextGeneration();
  EXPECT_EQ(generation.request.memory.knn, 3);
  EXPECT_THAT(generation.request.memory.layers, ::testing::ElementsAre(1, 4));
  EXPECT_THAT(generation.request.memory.masked_rows, ::testing::ElementsAre(7, 1000));
  ASSERT_TRUE(generation.request.memory_trace.has_value());
  EXPECT_EQ(generation.request.memory_trace->entries, 2);
  EXPECT_EQ(generation.request.memory_trace->tokens, 5);
  generation.listener->OnDelta(
      {.text = "y",
       .token_ids = {9},
       .memory_traces = {
           {.position = 6, .token_id = 8, .layers = {{.layer = 4, .heads = {0, 3}, .rows = {11, 12}, .weights = {0.5f, 0.25f}}}}}});
  engine_->End(generation, engine::Finished{});
  EXPECT_EQ(program->ExitStatus(), 0);
  EXPECT_EQ(program->out(), "6\t8\t4\t0\t11\t0.500000\n6\t8\t4\t3\t12\t0.250000\n");
}

TEST_F(ClientTest, RowsAndCountsAndTracesArePrinted) {
  EXPECT_EQ(Run({"rows", "7", "2", "--layer=4"})->out(), "7\t70 71\n2\t20 21\n");
  EXPECT_EQ(Run({"row-stats", "--layer=4", "--top=1", "--reset", "9"})->out(),
            "reads: 4\ndistinct_rows: 1 of 1048576\nsince_seconds: 3.000\ntop\t0\t100\nrow\t9\t9\n");
  AnswerWith({{.memory_traces =
                   {{.position = 1, .token_id = 8, .layers = {{.layer = 4, .heads = {2}, .rows = {11}, .weights = {0.5f}}}}}}},
             {});
  EXPECT_EQ(Run({"trace", "Hi", "--trace_entries=1", "--trace_tokens=3"})->out(), "1\t8\t4\t2\t11\t0.500000\n");
  EXPECT_EQ(nlohmann::json::parse(Run({"trace", "--json", "Hi"})->out()).at("tokens")[0].at("layers")[0].at("rows")[0], 11);
  EXPECT_EQ(status_, 0);
}

TEST_F(ClientTest, RepeatPrintsMicrosecondsAToken) {
  engine_->on_generate = [this](const FakeEngine::Generation& generation) {
    const int tokens = *generation.request.stop.max_tokens;
    for (int i = 0; i < tokens; ++i) generation.listener->OnDelta({.text = "x", .token_ids = {1}});
    engine_->End(generation, engine::Finished{.usage = {.completion_tokens = tokens}, .timings = {.decode = absl::Microseconds(100) * (tokens - 1)}});
  };
  const auto program = Run({"repeat", "--count=3", "--max_tokens=10", "x", "--json"});
  EXPECT_EQ(status_, 0);
  const nlohmann::json json = nlohmann::json::parse(program->out());
  EXPECT_EQ(json.at("streams"), 3);
  EXPECT_EQ(json.at("tokens"), 10);
  EXPECT_NEAR(json.at("engine_us_per_token").at("median").get<double>(), 100, 1e-6);
  EXPECT_GT(json.at("call_us").at("min").get<double>(), 0);
  EXPECT_TRUE(json.at("client_us_per_token").contains("median"));
}

TEST_F(ClientTest, AnErrorOfTheCallIsOneLineAndStatusTwo) {
  engine_->on_generate = [this](const FakeEngine::Generation& generation) {
    engine_->End(generation, absl::ResourceExhaustedError("max_waiting: 9 of 9"));
  };
  const auto program = Run({"complete", "x"});
  EXPECT_EQ(status_, 2);
  EXPECT_EQ(program->error(), "RESOURCE_EXHAUSTED: max_waiting: 9 of 9\n");
  EXPECT_EQ(Run({"complete", "x", "--model=other"})->error(), "NOT_FOUND: model is \"other\"; this server has \"fake\"\n");
  EXPECT_EQ(status_, 2);
}

TEST_F(ClientTest, ADeadlineIsStatusTwo) {
  auto program = Start({"complete", "x", "--timeout_seconds=0.2"});
  const FakeEngine::Generation generation = engine_->NextGeneration();
  EXPECT_EQ(program->ExitStatus(), 2);
  EXPECT_THAT(program->error(), StartsWith("DEADLINE_EXCEEDED: "));
  EXPECT_TRUE(engine_->WaitForCancel(generation.request.id));
}

TEST_F(ClientTest, NoServerIsStatusTwo) {
  server_.reset();
  Program program({MEMSERVE_CLIENT, "model", "--address=127.0.0.1:1"});
  EXPECT_EQ(program.ExitStatus(), 2);
  EXPECT_THAT(program.error(), StartsWith("UNAVAILABLE: "));
}

TEST_F(ClientTest, CtrlCCancelsTheCall) {
  auto program = Start({"complete", "x"});
  const FakeEngine::Generation generation = engine_->NextGeneration();
  generation.listener->OnDelta({.text = "a"});
  ASSERT_TRUE(program->ReadUntil("a"));
  program->Signal(SIGINT);
  EXPECT_TRUE(engine_->WaitForCancel(generation.request.id));
  EXPECT_EQ(program->ExitStatus(), 130);
  EXPECT_THAT(program->error(), StartsWith("CANCELLED: "));
}

TEST_F(ClientTest, AClientThatDiesCancelsItsRequest) {
  auto program = Start({"complete", "x"});
  const FakeEngine::Generation generation = engine_->NextGeneration();
  program->Signal(SIGKILL);
  EXPECT_TRUE(engine_->WaitForCancel(generation.request.id));
}

TEST_F(ClientTest, WrongUsageIsOneLineAndStatusOne) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{}, "give a COMMAND"},
      {{"frobnicate"}, "there is no command frobnicate"},
      {{"complete"}, "give one PROMPT"},
      {{"complete", "a", "b"}, "give one PROMPT"},
      {{"complete", "--token_ids", "1,x"}, "give one PROMPT"},
      {{"complete", "x", "--nonsense"}, "there is no flag --nonsense"},
      {{"complete", "x", "--top_k=1.5"}, "--top_k is \"1.5\"; it must be a whole number"},
      {{"complete", "x", "--memory=maybe"}, "--memory is \"maybe\"; it must be on or off"},
      {{"complete", "x", "--max_tokens"}, "--max_tokens needs a value"},
      {{"model", "--top_k=1"}, "--top_k means nothing to model"},
      {{"model", "x"}, "model takes no words"},
      {{"score", "ctx"}, "give CONTEXT and at least one CONTINUATION"},
      {{"chat", "Hello"}, "chat takes no words"},
      {{"complete", "--system=x", "y"}, "--system goes with --chat"},
      {{"detokenize", "x"}, "\"x\" is no token id"},
      {{"rows"}, "give at least one ROW"},
      {{"rows", "x"}, "give at least one ROW"},
      {{"row-stats", "x"}, "the words of row-stats are ROWs"},
      {{"trace"}, "give one PROMPT"},
      {{"complete", "x", "--masked_rows=1,"}, "--masked_rows is \"1,\"; it must be rows such as 17,1000"},
      {{"rows", "1", "--reset"}, "--reset means nothing to rows"},
      {{"repeat", "x", "--count=0"}, "--count must be at least 1"},
      {{"load_test", "--concurrency=1,x"}, "--concurrency is \"1,x\"; it must be numbers apart by commas"},
      {{"load_test", "--rates=0"}, "--concurrency, --rates and --load_factors must be more than 0"},
      {{"load_test", "--streams=2"}, "--streams goes with --long_prompt_tokens"},
      {{"repeat", "x", "--max_tokens=1"}, "--max_tokens must be at least 2"},
  };
  for (const auto& [words, message] : cases) {
    const auto program = Run(words);
    EXPECT_EQ(status_, 1) << message;
    EXPECT_THAT(program->error(), StartsWith("memserve-client: " + message));
    EXPECT_EQ(std::count(program->error().begin(), program->error().end(), '\n'), 1);
    EXPECT_EQ(program->out(), "");
  }
}

TEST_F(ClientTest, HelpNamesEveryCommandAndFlag) {
  const auto program = Run({"--help"});
  EXPECT_EQ(status_, 0);
  for (const char* word : {"complete",        "score",
                           "tokenize",        "detokenize",
                           "model",           "load",
                           "tables",          "abort",
                           "repeat",          "load_test",
                           "--load_factors",  "--long_prompt_tokens",
                           "--address",       "--timeout_seconds",
                           "--json",          "--add_bos",
                           "--token_ids",     "--memory",
                           "--model",         "--request_id",
                           "--max_tokens",    "--temperature",
                           "--top_k",         "--top_p",
                           "--seed",          "--stop",
                           "--ignore_eos",    "--logprobs",
                           "--stats",         "--count",
                           "Examples",        "--chat",
                           "--system",        "  chat ",
                           "--allow_special", "  rows ",
                           "  row-stats ",    "  trace ",
                           "--memory_knn",    "--memory_layers",
                           "--masked_rows",   "--trace ",
                           "--trace_entries", "--trace_tokens",
                           "--layer",         "--top=",
                           "--reset"}) {
    EXPECT_THAT(program->out(), HasSubstr(word));
  }
}

// Answers at once: three tokens, the first apart from the others.
void AnswerThreeTokens(FakeEngine& engine, const FakeEngine::Generation& generation) {
  generation.listener->OnDelta({.token_ids = {1}});
  generation.listener->OnDelta({.token_ids = {2, 3}});
  engine.End(generation, engine::Finished{.usage = {.prompt_tokens = 10, .cached_tokens = 5, .completion_tokens = 3}});
}

TEST_F(ClientTest, ALoadTestKeepsSoManyStreamsRunningAndCountsThem) {
  std::mutex mutex;
  size_t arrived = 0;
  std::set<size_t> lengths;
  std::vector<FakeEngine::Generation> held;  // in the second point nobody is answered before two are there
  engine_->on_generate = [&](const FakeEngine::Generation& generation) {
    const std::lock_guard lock(mutex);
    lengths.insert(std::get<std::vector<int32_t>>(generation.request.prompt).size());
    EXPECT_TRUE(generation.request.stop.ignore_eos);
    held.push_back(generation);
    if (++arrived > 20 && held.size() < 2) return;
    for (const FakeEngine::Generation& each : std::exchange(held, {})) AnswerThreeTokens(*engine_, each);
  };
  const std::string file = absl::StrCat(::testing::TempDir(), "/load_", getpid(), ".json");
  auto program = Run({"load_test", "--concurrency=1,2", "--requests=20", "--prompt_tokens=10", "--output_tokens=3",
                      "--timeout_seconds=20", "--json", absl::StrCat("--json_file=", file)});
  EXPECT_EQ(status_, 0) << program->error();
  EXPECT_GE(*lengths.begin(), 5);
  EXPECT_LE(*lengths.rbegin(), 15);
  EXPECT_GT(lengths.size(), 2);
  const auto report = nlohmann::json::parse(std::ifstream(file));
  std::remove(file.c_str());
  ASSERT_EQ(report.at("points").size(), 2);
  for (const auto& point : report.at("points")) {
    EXPECT_EQ(point.at("sent"), 20);
    EXPECT_EQ(point.at("done"), 20);
    EXPECT_EQ(point.at("good"), 20);
    EXPECT_EQ(point.at("failed"), 0);
    EXPECT_EQ(point.at("cached_share"), 0.5);
    EXPECT_NEAR(point.at("output_tokens_per_second"), 3 * point.at("requests_per_second").get<double>(), 1e-6);
    EXPECT_GT(point.at("ttft_ms").at("p50"), 0);
    EXPECT_TRUE(point.at("refusal_ms").is_null());
  }
  EXPECT_EQ(report["points"][0], nlohmann::json::parse(program->out().substr(0, program->out().find('\n'))));
}

TEST_F(ClientTest, ALoadTestTellsRefusedFromFailedAndExpired) {
  std::atomic<int> count = 0;
  engine_->on_generate = [&](const FakeEngine::Generation& generation) {
    absl::Status refused = absl::ResourceExhaustedError("max_waiting");
    engine::SetRetryAfter(absl::Milliseconds(250), &refused);
    switch (count++ % 4) {
      case 0:
        return engine_->End(generation, refused);
      case 1:
        return engine_->End(generation, absl::InternalError("broken"));
      case 2:
        return engine_->End(generation, absl::DeadlineExceededError("too late"));
      default:
        return AnswerThreeTokens(*engine_, generation);
    }
  };
  auto program = Run({"load_test", "--concurrency=1", "--requests=8", "--json"});
  EXPECT_EQ(status_, 0) << program->error();
  const auto point = nlohmann::json::parse(program->out());
  EXPECT_EQ(point.at("sent"), 8);
  EXPECT_EQ(point.at("done"), 2);
  EXPECT_EQ(point.at("refused"), 2);
  EXPECT_EQ(point.at("expired"), 2);
  EXPECT_EQ(point.at("failed"), 2);
  EXPECT_THAT(point.at("failure").get<std::string>(), HasSubstr("broken"));
  EXPECT_EQ(point.at("retry_after_ms").at("max"), 250);
  EXPECT_LT(point.at("refusal_ms").at("p50"), 10'000);
}

TEST_F(ClientTest, ALoadTestsArrivalsDoNotWaitForAnswers) {
  std::mutex mutex;
  size_t arrived = 0;
  std::vector<FakeEngine::Generation> held;  // nobody is answered before ten are there
  engine_->on_generate = [&](const FakeEngine::Generation& generation) {
    const std::lock_guard lock(mutex);
    held.push_back(generation);
    if (++arrived < 10) return;
    for (const FakeEngine::Generation& each : std::exchange(held, {})) AnswerThreeTokens(*engine_, each);
  };
  auto program = Run({"load_test", "--rates=100", "--seconds=0.5", "--ttft_slo_ms=0.001", "--timeout_seconds=20", "--json"});
  EXPECT_EQ(status_, 0) << program->error();
  const auto point = nlohmann::json::parse(program->out());
  EXPECT_GT(point.at("sent"), 20);
  EXPECT_EQ(point.at("done"), point.at("sent"));
  EXPECT_EQ(point.at("good"), 0);  // none within a microsecond
  EXPECT_EQ(point.at("goodput_tokens_per_second"), 0);
  EXPECT_EQ(point.at("offered_requests_per_second"), 100);
}

}  // namespace
}  // namespace memserve::server
