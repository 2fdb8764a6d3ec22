// Requests through the whole engine, on the reference checkpoints.

#include "engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <set>
#include <thread>

#include "engine/retry_after.h"
#include "engine/structured/grammar.h"
#include "nlohmann/json.hpp"
#include "tests/support/collector.h"
#include "tests/support/engines.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using memserve::testing::Collector;
using memserve::testing::ExpectNoPagesLeft;
using memserve::testing::Generate;
using memserve::testing::GenerateAll;
using memserve::testing::Generated;
using memserve::testing::GoldenCase;
using memserve::testing::GoldenSequence;
using memserve::testing::LoadGolden;
using memserve::testing::ParityOptions;
using memserve::testing::Score;
using memserve::testing::Start;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kNoMemory[] = "E";  // a dense case

EngineOptions Options(const std::string& golden) {
  return ParityOptions(std::string(MEMSERVE_GOLDEN_DIR) + "/" + golden + "/checkpoint");
}

GenerateRequest GreedyRequest(const std::vector<int32_t>& tokens, int max_tokens) {
  GenerateRequest request;
  request.prompt = tokens;
  request.stop = {.max_tokens = max_tokens, .ignore_eos = true};
  request.logprobs = true;
  return request;
}

class GoldenEngineTest : public ::testing::TestWithParam<std::string> {};

TEST_P(GoldenEngineTest, GreedyTokensEqualTheOriginalsAloneAndAllAtOnce) {
  const GoldenCase golden = LoadGolden(GetParam());
  const std::unique_ptr<Engine> engine = Start(Options(GetParam()));
  std::vector<GenerateRequest> requests;
  std::vector<Generated> alone;
  for (const GoldenSequence& sequence : golden.sequences) {
    if (sequence.greedy_tokens.empty()) continue;
    requests.push_back(GreedyRequest(sequence.tokens, static_cast<int>(sequence.greedy_tokens.size())));
    alone.push_back(Generate(*engine, requests.back()));
    EXPECT_EQ(alone.back().token_ids, sequence.greedy_tokens) << sequence.name;
  }
  ASSERT_FALSE(alone.empty());
  EXPECT_EQ(GenerateAll(*engine, requests), alone);
  ExpectNoPagesLeft(*engine);
}

TEST_P(GoldenEngineTest, TextsContinueAsTheirTokensDo) {
  const GoldenCase golden = LoadGolden(GetParam());
  const std::unique_ptr<Engine> engine = Start(Options(GetParam()));
  int texts = 0;
  for (const GoldenSequence& sequence : golden.sequences) {
    if (sequence.greedy_tokens.empty() || !sequence.text) continue;
    GenerateRequest request = GreedyRequest({}, static_cast<int>(sequence.greedy_tokens.size()));
    request.prompt = *sequence.text;
    EXPECT_EQ(Generate(*engine, request).token_ids, sequence.greedy_tokens) << sequence.name;
    ++texts;
  }
  EXPECT_GT(texts, 0);
}

TEST_P(GoldenEngineTest, ScoresEqualTheOriginalsLogLikelihoods) {
  const GoldenCase golden = LoadGolden(GetParam());
  const std::unique_ptr<Engine> engine = Start(Options(GetParam()));
  for (const GoldenSequence& sequence : golden.sequences) {
    if (sequence.tokens.size() < 3) continue;
    ScoreRequest request;
    request.context = std::vector<int32_t>(sequence.tokens.begin(), sequence.tokens.begin() + 1);
    request.continuations = {std::vector<int32_t>(sequence.tokens.begin() + 1, sequence.tokens.end()), std::vector<int32_t>{5}};
    const absl::StatusOr<ScoreResult> result = Score(*engine, request);
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_EQ(result->scores.size(), 2u);
    ASSERT_EQ(result->scores[0].token_logprobs.size(), sequence.loglikelihood.size());
    double sum = 0;
    for (size_t i = 0; i < sequence.loglikelihood.size(); ++i) {
      EXPECT_NEAR(result->scores[0].token_logprobs[i], sequence.loglikelihood[i], 2e-4) << sequence.name << " token " << i + 1;
      sum += result->scores[0].token_logprobs[i];
    }
    EXPECT_NEAR(result->scores[0].logprob, sum, 1e-6);
    EXPECT_EQ(result->scores[1].token_logprobs.size(), 1u);
  }
  ExpectNoPagesLeft(*engine);
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenEngineTest, ::testing::ValuesIn(memserve::testing::GoldenNames()));

// Requests that differ in all that may be set, for the promise "same request, same answer".
std::vector<GenerateRequest> VariedRequests(const GoldenCase& golden) {
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 60; ++i) {
    const std::vector<int32_t>& tokens = golden.sequences[i % golden.sequences.size()].tokens;
    GenerateRequest request = GreedyRequest(std::vector<int32_t>(tokens.begin(), tokens.begin() + 1 + i * 7 % static_cast<int>(tokens.size())),
                                            3 + i * 5 % 40);
    if (i % 3 != 0) {
      request.sampling = {.temperature = 0.3f + 0.2f * static_cast<float>(i % 5), .seed = 1000u + static_cast<uint64_t>(i)};
      if (i % 2 == 0) request.sampling.top_k = 1 + i;
      if (i % 5 == 1) request.sampling.top_p = 0.7f;
    }
    request.memory.enabled = i % 4 != 3;
    if (!golden.memory_layers.empty()) {
      if (i % 3 == 1) request.memory.knn = 1 + i % 4;
      if (i % 5 == 2) request.memory.layers = {golden.memory_layers[i % golden.memory_layers.size()]};
      for (int32_t row = i; row < 320 && i % 4 == 1; row += 2) request.memory.masked_rows.push_back(row);
    }
    if (i % 6 == 1) request.sampling.repetition_penalty = 1.3f;
    if (i % 6 == 2) request.sampling = {.temperature = 0.9f, .seed = 5u, .min_p = 0.05f, .presence_penalty = 0.4f, .penalty_window = 9};
    if (i % 6 == 4) request.sampling.logit_bias = {{7, 2.5f}, {9, -3.0f}};
    if (i % 6 == 5) request.sampling.typical_p = 0.8f;
    if (i % 7 == 3) request.top_logprobs = 1 + i % 5;
    if (StructuredOutputIsBuilt()) {
      using Kind = StructuredOutput::Kind;
      if (i % 8 == 3) request.structured = StructuredOutput{.kind = Kind::kRegex, .text = "([a-z]{1,5} ?){3,9}[.!]"};
      if (i == 5) request.structured = StructuredOutput{.kind = Kind::kJson};
      if (i == 10) request.structured = StructuredOutput{.kind = Kind::kChoice, .choices = {"one of these", "or another"}};
    }
    if (i % 8 == 2) request.prompt_logprobs = i % 3;
    if (i % 9 == 4) request.logprob_token_ids = {3, i, 2 * i};
    if (i % 10 == 6) request.sampling.allowed_token_ids = {20, 21, 22, 23};
    if (i % 11 == 5) request.sampling.banned_token_ids = {17, 18};
    if (i % 12 == 7) request.stop.strings = {"st", "zz"};
    if (i % 2 == 0) request.speculation = SpeculationParams{.max_draft_tokens = 1 + i % 9, .min_ngram = 1 + i % 2};
    requests.push_back(std::move(request));
  }
  return requests;
}

// All that is told beside the tokens themselves.
std::vector<float> LogprobsBeside(const Generated& generated) {
  std::vector<float> all;
  const auto add_top = [&](const std::vector<std::vector<TokenLogprob>>& lists) {
    for (const std::vector<TokenLogprob>& top : lists) {
      for (const TokenLogprob& one : top) all.insert(all.end(), {static_cast<float>(one.token_id), one.logprob});
    }
  };
  add_top(generated.top_logprobs);
  for (const std::vector<float>& chosen : generated.chosen_logprobs) all.insert(all.end(), chosen.begin(), chosen.end());
  for (const PromptDelta& delta : generated.prompt) all.insert(all.end(), delta.logprobs.begin(), delta.logprobs.end());
  for (const PromptDelta& delta : generated.prompt) add_top(delta.top_logprobs);
  return all;
}

std::vector<Generated> OneByOne(Engine& engine, const std::vector<GenerateRequest>& requests) {
  std::vector<Generated> all;
  for (const GenerateRequest& request : requests) all.push_back(Generate(engine, request));
  return all;
}

struct Variation {
  std::string name;
  std::string golden;
  int max_batch_tokens = 512;
  int max_sequences = 64;
  int threads = 2;
  int page_size = 16;
  int step_depth = 1;
  std::string weight_dtype = "auto";
  std::string activation_dtype = "f32";
  std::string kv_dtype = "auto";
  bool tight_cache = false;  // room for one context only: requests wait for pages
};

class InvarianceTest : public ::testing::TestWithParam<Variation> {};

// Tokens and logprobs, bit for bit, whatever runs beside a request and however steps are cut.
TEST_P(InvarianceTest, AnswersDependOnTheRequestAlone) {
  const Variation& variation = GetParam();
  const GoldenCase golden = LoadGolden(variation.golden);
  const std::vector<GenerateRequest> requests = VariedRequests(golden);
  EngineOptions options = Options(variation.golden);
  options.weight_dtype = variation.weight_dtype;
  options.activation_dtype = variation.activation_dtype;
  options.kv_dtype = variation.kv_dtype;
  options.threads = 1;
  std::vector<GenerateRequest> uncached = requests;
  for (GenerateRequest& request : uncached) {
    request.scheduling.prefix_cache = false;
    request.speculation.reset();
  }
  const std::vector<Generated> expected = OneByOne(*Start(options), uncached);
  for (const Generated& generated : expected) ASSERT_TRUE(generated.finished.ok()) << generated.finished.status();

  options.threads = variation.threads;
  options.max_batch_tokens = variation.max_batch_tokens;
  options.max_sequences = variation.max_sequences;
  options.kv_page_size = variation.page_size;
  options.step_depth = variation.step_depth;
  if (variation.tight_cache) options.kv_cache_bytes = variation.kv_dtype == "int8" ? 1 << 16 : 1 << 18;
  const std::unique_ptr<Engine> engine = Start(options);
  ASSERT_NE(engine, nullptr);
  // Once cold, once warm; with a tight cache until it had to preempt (requests that arrive slowly do not meet).
  for (int round = 0; round < 2 || (variation.tight_cache && engine->load().preemptions == 0 && round < 100); ++round) {
    const char* cache = round == 0 ? "cold" : "warm";
    const std::vector<Generated> found = GenerateAll(*engine, requests);
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(found[i].token_ids, expected[i].token_ids) << "request " << i << ", cache " << cache;
      EXPECT_EQ(found[i].logprobs, expected[i].logprobs) << "request " << i << ", cache " << cache;
      EXPECT_EQ(found[i].text, expected[i].text) << "request " << i << ", cache " << cache;
      EXPECT_EQ(LogprobsBeside(found[i]), LogprobsBeside(expected[i])) << "request " << i << ", cache " << cache;
    }
  }
  ExpectNoPagesLeft(*engine);
  if (variation.tight_cache) {
    EXPECT_GT(engine->load().preemptions, 0);
  } else {
    EXPECT_GT(engine->load().cached_tokens, 0) << "the second time prompts are found";
  }
  // Small steps leave no room for guesses.
  if (variation.max_batch_tokens == 512 && variation.max_sequences == 64) {
    EXPECT_GT(engine->load().accepted_draft_tokens, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Axes, InvarianceTest,
    ::testing::Values(
        Variation{.name = "ManyAtOnce", .golden = "A"}, Variation{.name = "OneThread", .golden = "A", .threads = 1},
        Variation{.name = "ThreeThreads", .golden = "A", .threads = 3},
        Variation{.name = "ChunksOfOneToken", .golden = "A", .max_batch_tokens = 1},
        Variation{.name = "ChunksOfThree", .golden = "A", .max_batch_tokens = 3},
        Variation{.name = "ChunksOf17", .golden = "A", .max_batch_tokens = 17, .max_sequences = 5},
        Variation{.name = "BatchesOfTwo", .golden = "A", .max_sequences = 2},
        Variation{.name = "BatchesOfSeven", .golden = "A", .max_sequences = 7},
        Variation{.name = "BatchesOf32", .golden = "A", .max_sequences = 32},
        Variation{.name = "ChunksOf16", .golden = "A", .max_batch_tokens = 16},
        Variation{.name = "PagesOf32", .golden = "A", .page_size = 32},
        Variation{.name = "TwoStepsInFlight", .golden = "A", .step_depth = 2},
        Variation{.name = "TwoInFlightSmallChunks", .golden = "A", .max_batch_tokens = 5, .step_depth = 2},
        Variation{.name = "TightCache", .golden = "A", .tight_cache = true},
        Variation{.name = "TightCacheTwoInFlight", .golden = "A", .max_batch_tokens = 9, .step_depth = 2, .tight_cache = true},
        Variation{.name = "Int8Kv", .golden = "A", .max_batch_tokens = 17, .threads = 3, .kv_dtype = "int8"},
        Variation{.name = "Int8KvChunksOfOneToken", .golden = "A", .max_batch_tokens = 1, .kv_dtype = "int8"},
        Variation{.name = "Int8KvTightCache",
                  .golden = "A",
                  .max_batch_tokens = 9,
                  .step_depth = 2,
                  .kv_dtype = "int8",
                  .tight_cache = true},
        Variation{.name = "OwnTables", .golden = "B", .max_batch_tokens = 19},
        Variation{.name = "Peer", .golden = "D", .max_batch_tokens = 19},
        Variation{.name = "Dense", .golden = "E", .max_batch_tokens = 19},
        Variation{.name = "Bfloat16", .golden = "F", .max_batch_tokens = 19, .activation_dtype = "bf16"},
        Variation{.name = "Bfloat16Weights", .golden = "H", .max_batch_tokens = 19, .weight_dtype = "bf16"}),
    [](const auto& info) { return info.param.name; });

TEST(EngineTest, TwoAndThreeRanksGiveTheTokensOfOne) {
  for (const char* name : {"A", "B", "D", "E", "H"}) {
    const GoldenCase golden = LoadGolden(name);
    for (int ranks : {2, 3}) {
      EngineOptions options = Options(name);
      options.devices.clear();
      for (int r = 0; r < ranks; ++r) options.devices.push_back(r);
      options.step_depth = ranks - 1;
      const std::unique_ptr<Engine> engine = Start(options);
      ASSERT_NE(engine, nullptr);
      EXPECT_EQ(engine->model().devices, ranks);
      std::vector<GenerateRequest> requests;
      for (const GoldenSequence& sequence : golden.sequences) {
        if (!sequence.greedy_tokens.empty()) requests.push_back(GreedyRequest(sequence.tokens, 64));
      }
      const std::vector<Generated> found = GenerateAll(*engine, requests);
      size_t i = 0;
      for (const GoldenSequence& sequence : golden.sequences) {
        if (sequence.greedy_tokens.empty()) continue;
        EXPECT_EQ(found[i++].token_ids, sequence.greedy_tokens) << name << " " << sequence.name;
      }
      ExpectNoPagesLeft(*engine);
    }
  }
}

TEST(EngineTest, ATableSharedByLayersIsHeldOnce) {
  // Lists a copy of the table under each of its two layers.
  const std::unique_ptr<Engine> shared = Start(Options("A"));
  ASSERT_EQ(shared->model().value_tables.size(), 1u);
  EXPECT_THAT(shared->model().value_tables[0].layers, ElementsAre(1, 4));
  EXPECT_EQ(shared->model().value_tables[0].bytes, 32 * 32 * 64 * 2);
  // Own tables.
  const std::unique_ptr<Engine> own = Start(Options("B"));
  ASSERT_EQ(own->model().value_tables.size(), 3u);
  EXPECT_EQ(own->model().value_tables[1].rows, 400);
  EXPECT_EQ(own->model().value_tables[1].dim, 40);
  EXPECT_THAT(Start(Options(kNoMemory))->model().value_tables, IsEmpty());
}

TEST(EngineTest, MemoryOffChangesTheAnswerOfThatRequestAlone) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  const GenerateRequest on = GreedyRequest(golden.sequences[0].tokens, 32);
  GenerateRequest off = on;
  off.memory.enabled = false;
  const std::vector<Generated> found = GenerateAll(*engine, {on, off, on});
  EXPECT_EQ(found[0].token_ids, found[2].token_ids);
  EXPECT_NE(found[0].token_ids, found[1].token_ids);
  EXPECT_EQ(Generate(*engine, off).logprobs, found[1].logprobs);
}

TEST(EngineTest, SeedsRepeatAndDiffer) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  GenerateRequest request = GreedyRequest(golden.sequences[0].tokens, 32);
  request.sampling.temperature = 1.0f;
  const Generated unset = Generate(*engine, request);
  ASSERT_TRUE(unset.finished.ok());
  EXPECT_NE(Generate(*engine, request).token_ids, unset.token_ids) << "two drawn seeds gave the same 32 tokens";
  request.sampling.seed = unset.finished->seed;
  EXPECT_EQ(Generate(*engine, request).token_ids, unset.token_ids) << "the seed that was returned repeats the answer";
  request.sampling.seed = 0;
  EXPECT_EQ(Generate(*engine, request).finished->seed, 0u);
}

TEST(EngineTest, StopsAtIdsStringsAndLengths) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  const GenerateRequest plain = GreedyRequest(golden.sequences[0].tokens, 40);
  const Generated all = Generate(*engine, plain);
  ASSERT_EQ(all.token_ids.size(), 40u);
  EXPECT_EQ(all.finished->reason, FinishReason::kLength);
  EXPECT_EQ(all.finished->usage.completion_tokens, 40);

  GenerateRequest by_id = plain;
  by_id.stop.token_ids = {all.token_ids[20]};
  const Generated stopped = Generate(*engine, by_id);
  const size_t first = std::find(all.token_ids.begin(), all.token_ids.end(), all.token_ids[20]) - all.token_ids.begin();
  EXPECT_EQ(stopped.finished->reason, FinishReason::kStop);
  EXPECT_EQ(stopped.finished->stop_token_id, all.token_ids[20]);
  EXPECT_EQ(stopped.token_ids, std::vector<int32_t>(all.token_ids.begin(), all.token_ids.begin() + static_cast<int64_t>(first) + 1));

  GenerateRequest by_string = plain;
  by_string.stop.strings = {all.text.substr(10, 6), "never there"};
  const Generated cut = Generate(*engine, by_string);
  EXPECT_EQ(cut.text, all.text.substr(0, all.text.find(by_string.stop.strings[0])));
  EXPECT_EQ(cut.finished->reason, FinishReason::kStop);
  EXPECT_EQ(cut.finished->stop_string, by_string.stop.strings[0]);
  EXPECT_EQ(Generate(*engine, by_string).token_ids, cut.token_ids);
  ExpectNoPagesLeft(*engine);
}

TEST(EngineTest, TextAndTokenIdsOfThePromptGiveTheSameAnswer) {
  const std::unique_ptr<Engine> engine = Start(Options("F"));
  GenerateRequest text = GreedyRequest({}, 16);
  text.prompt = "The keeper of the harbour";
  const Generated by_text = Generate(*engine, text);
  const GoldenCase golden = LoadGolden("F");
  EXPECT_EQ(by_text.token_ids, std::vector<int32_t>(golden.sequences[0].greedy_tokens.begin(), golden.sequences[0].greedy_tokens.begin() + 16));
  EXPECT_EQ(by_text.finished->usage.prompt_tokens, static_cast<int>(golden.sequences[0].tokens.size()));
}

TEST(EngineTest, AScoredTextContinuesItsContextAsInADocument) {
  const std::unique_ptr<Engine> engine = Start(Options("F"));
  const GoldenCase golden = LoadGolden("F");
  const std::vector<int32_t>& tokens = golden.sequences[0].tokens;  // of "The keeper of the harbour", begin of sequence in front
  ScoreRequest text;
  text.context = "The keeper";
  text.continuations = {" of the harbour"};
  const absl::StatusOr<ScoreResult> by_text = Score(*engine, text);
  ASSERT_TRUE(by_text.ok()) << by_text.status();
  const size_t scored = by_text->scores[0].token_ids.size();
  EXPECT_EQ(by_text->scores[0].token_ids, std::vector<int32_t>(tokens.end() - static_cast<int64_t>(scored), tokens.end()));
  ScoreRequest ids;
  ids.context = std::vector<int32_t>(tokens.begin(), tokens.end() - static_cast<int64_t>(scored));
  ids.continuations = {by_text->scores[0].token_ids};
  EXPECT_EQ(Score(*engine, ids)->scores[0].token_logprobs, by_text->scores[0].token_logprobs);
  EXPECT_EQ(by_text->usage.prompt_tokens + by_text->usage.completion_tokens, static_cast<int>(tokens.size()));
}

TEST(EngineTest, WrongRequestsNameFieldValueAndLimit) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  const auto error = [&](const std::function<void(GenerateRequest&)>& change) {
    GenerateRequest request = GreedyRequest({1, 2, 3}, 4);
    change(request);
    return Generate(*engine, request).finished.status();
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(error([&](auto& r) { r.sampling.temperature = -1; }).message(), "temperature: -1 is not in [0, 100]");
  EXPECT_EQ(error([&](auto& r) { r.sampling.temperature = nan; }).message(), "temperature: nan is not in [0, 100]");
  EXPECT_EQ(error([&](auto& r) { r.sampling.top_p = 0; }).message(), "top_p: 0 is not in (0, 1]");
  EXPECT_EQ(error([&](auto& r) { r.sampling.top_p = nan; }).message(), "top_p: nan is not in (0, 1]");
  EXPECT_EQ(error([&](auto& r) { r.sampling.top_k = -2; }).message(), "top_k: -2 is not at least 0");
  EXPECT_EQ(error([&](auto& r) { r.stop.max_tokens = 0; }).message(), "max_tokens: 0 is not at least 1");
  EXPECT_EQ(error([&](auto& r) { r.prompt = std::vector<int32_t>{1, 258}; }).message(), "prompt: id 258 at index 1 is not in [0, 258)");
  EXPECT_EQ(error([&](auto& r) { r.prompt = std::vector<int32_t>{-1}; }).message(), "prompt: id -1 at index 0 is not in [0, 258)");
  EXPECT_EQ(error([&](auto& r) { r.prompt = std::vector<int32_t>{}; }).message(), "prompt: has no tokens; at least 1 is needed");
  EXPECT_EQ(error([&](auto& r) { r.prompt = std::vector<int32_t>(256, 7); }).message(),
            "prompt: has 256 tokens; this server accepts 255 (context of 256, and at least 1 to draw)");
  EXPECT_EQ(error([&](auto& r) { r.prompt = std::string(300, 'x'); }).message(),
            "prompt: has 301 tokens; this server accepts 255 (context of 256, and at least 1 to draw)");
  EXPECT_EQ(error([&](auto& r) { r.prompt = std::string((1 << 20) + 1, 'x'); }).message(), "prompt: has 1048577 bytes; this server accepts 1048576");
  EXPECT_EQ(error([&](auto& r) { r.stop.strings = {"a", ""}; }).message(), "stop.strings: string 1 has 0 bytes; 1 to 256 are accepted");
  EXPECT_EQ(error([&](auto& r) { r.stop.strings.assign(17, "a"); }).message(), "stop.strings: has 17 strings; at most 16 are accepted");
  EXPECT_EQ(error([&](auto& r) { r.stop.token_ids = {999}; }).message(), "stop.token_ids: id 999 at index 0 is not in [0, 258)");
  EXPECT_EQ(error([&](auto& r) { r.id = std::string(257, 'i'); }).message(), "request_id: has 257 bytes; at most 256 are accepted");
  EXPECT_EQ(error([&](auto& r) { r.deadline = absl::Now() - absl::Seconds(1); }).code(), absl::StatusCode::kDeadlineExceeded);

  ScoreRequest score;
  score.context = std::vector<int32_t>{1};
  EXPECT_EQ(Score(*engine, score).status().message(), "continuations: has 0 entries; 1 to 256 are accepted");
  score.continuations = {std::vector<int32_t>{2}, std::vector<int32_t>{}};
  EXPECT_EQ(Score(*engine, score).status().message(), "continuations[1]: has no tokens; at least 1 is needed");
  score.continuations = {std::vector<int32_t>(256, 2)};
  EXPECT_EQ(Score(*engine, score).status().message(), "continuations[0]: with the context it has 257 tokens; this server accepts 256");
  score.context = std::vector<int32_t>{};
  EXPECT_EQ(Score(*engine, score).status().message(), "context: has no tokens; at least 1 is needed");

  EXPECT_EQ(Generate(*engine, GreedyRequest({1, 2, 3}, 4)).token_ids.size(), 4u) << "the engine goes on";
  ExpectNoPagesLeft(*engine);
}

TEST(EngineTest, ACheckpointWithoutTokenizerTakesIdsAndSaysSoForText) {
  const std::string folder = ::testing::TempDir() + "/no_tokenizer";
  std::filesystem::remove_all(folder);
  std::filesystem::copy(std::string(MEMSERVE_GOLDEN_DIR) + "/H/checkpoint", folder);
  std::ifstream config_file(folder + "/config.json");
  nlohmann::json config = nlohmann::json::parse(config_file);
  config["tokenizer"] = "none";
  std::ofstream(folder + "/config.json") << config;
  const std::unique_ptr<Engine> engine = Start(ParityOptions(folder));
  GenerateRequest request = GreedyRequest({}, 4);
  request.prompt = "text";
  const absl::Status status = Generate(*engine, request).finished.status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(status.message()), HasSubstr("send token ids"));
  EXPECT_EQ(Generate(*engine, GreedyRequest({600, 1, 2}, 4)).token_ids.size(), 4u);
}

TEST(EngineTest, AChatIsItsTemplateWithSpecialTokensFromTheTemplateAlone) {
  const std::string folder = ::testing::TempDir() + "/chat_checkpoint";
  std::filesystem::remove_all(folder);
  std::filesystem::copy(std::string(MEMSERVE_GOLDEN_DIR) + "/A/checkpoint", folder);
  std::ofstream(folder + "/chat_template.jinja")
      << "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content|trim }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}";
  const std::unique_ptr<Engine> engine = Start(ParityOptions(folder));
  ASSERT_TRUE(engine->model().chat);
  GenerateRequest request = GreedyRequest({256, 'u', ':', 'H', '<', '/', 's', '>', 'i', 257, 'a', ':'}, 8);
  const std::vector<int32_t> expected = Generate(*engine, request).token_ids;
  request.prompt = Chat{.messages = {{"user", " H</s>i "}}};
  const Generated chat = Generate(*engine, request);
  ASSERT_TRUE(chat.finished.ok()) << chat.finished.status();
  EXPECT_EQ(chat.finished->usage.prompt_tokens, 12) << "the </s> of a message is text, that of the template a token";
  EXPECT_EQ(chat.token_ids, expected);
  request.prompt = Chat{.messages = {{"user", "H"}}, .add_generation_prompt = false};
  EXPECT_EQ(Generate(*engine, request).finished->usage.prompt_tokens, 5);

  request.prompt = Chat{};
  EXPECT_EQ(Generate(*engine, request).finished.status().message(), "prompt: has 0 messages; 1 to 4096 are accepted");
  request.prompt = Chat{.messages = {{"user", std::string(2 << 20, 'x')}}};
  EXPECT_EQ(Generate(*engine, request).finished.status().message(), "prompt: has 2097152 bytes of messages; this server accepts 1048576");
  request.prompt = Chat{.messages = {{"", "x"}}};
  EXPECT_EQ(Generate(*engine, request).finished.status().message(), "prompt.messages[0]: has a role of 0 bytes; 1 to 64 are accepted");
}

TEST(EngineTest, ACheckpointWithoutChatTemplateSaysSo) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  EXPECT_FALSE(engine->model().chat);
  GenerateRequest request = GreedyRequest({}, 8);
  request.prompt = Chat{.messages = {{"user", "Hello"}}};
  const absl::Status status = Generate(*engine, request).finished.status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(status.message(), "chat: the checkpoint has no chat template; send a text");
}

TEST(EngineTest, NamesOfSpecialTokensInATextAreTextUnlessAllowed) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  GenerateRequest request = GreedyRequest({}, 2);
  request.prompt = "a</s>b";
  EXPECT_EQ(Generate(*engine, request).finished->usage.prompt_tokens, 7);
  request.allow_special = true;
  EXPECT_EQ(Generate(*engine, request).finished->usage.prompt_tokens, 4);
}

TEST(EngineTest, CancelledRequestsGiveTheirPagesBackAndHurtNobody) {
  const GoldenCase golden = LoadGolden("A");
  EngineOptions options = Options("A");
  options.max_sequences = 4;  // so that some are cancelled while they wait
  const std::unique_ptr<Engine> engine = Start(options);
  const GenerateRequest request = GreedyRequest(golden.sequences[0].tokens, 200);
  const Generated solo = Generate(*engine, request);
  std::vector<std::shared_ptr<Collector>> collectors;
  std::vector<std::string> ids;
  for (int i = 0; i < 12; ++i) {
    collectors.push_back(std::make_shared<Collector>());
    GenerateRequest named = request;
    named.id = "request-" + std::to_string(i);
    ids.push_back(engine->Generate(named, collectors.back()));
  }
  collectors[0]->WaitForFirstDelta();
  for (int i = 0; i < 12; i += 2) EXPECT_TRUE(engine->Cancel(ids[i])) << i;
  int cancelled = 0;
  for (int i = 0; i < 12; ++i) {
    const Generated generated = collectors[i]->Wait();
    if (i % 2 == 0) {
      cancelled += generated.finished.status().code() == absl::StatusCode::kCancelled;
      const std::vector<int32_t> begin(solo.token_ids.begin(), solo.token_ids.begin() + static_cast<int64_t>(generated.token_ids.size()));
      EXPECT_EQ(generated.token_ids, begin);
    } else {
      EXPECT_EQ(generated, solo);
    }
  }
  EXPECT_GE(cancelled, 5);
  EXPECT_FALSE(engine->Cancel("request-0")) << "an id is free once its request has ended";
  ExpectNoPagesLeft(*engine);
}

TEST(EngineTest, ADeadlineEndsAGenerationAndFreesItsPages) {
  EngineOptions options = Options("A");
  const std::unique_ptr<Engine> engine = Start(options);
  // Many at once, so that 250 tokens take longer than the deadline on any machine fast enough to test on.
  std::vector<GenerateRequest> requests(64, GreedyRequest({1, 2, 3}, 250));
  for (GenerateRequest& request : requests) request.deadline = absl::Now() + absl::Milliseconds(20);
  for (const Generated& generated : GenerateAll(*engine, requests)) {
    if (generated.finished.ok()) continue;
    EXPECT_EQ(generated.finished.status().code(), absl::StatusCode::kDeadlineExceeded);
  }
  ExpectNoPagesLeft(*engine);
}

std::vector<int32_t> TokensOf(Engine& engine, const std::function<void(GenerateRequest&)>& change, int max_tokens = 30) {
  GenerateRequest request = GreedyRequest({1, 2, 3}, max_tokens);
  change(request);
  const Generated generated = Generate(engine, request);
  EXPECT_TRUE(generated.finished.ok()) << generated.finished.status();
  return generated.token_ids;
}

TEST(EngineTest, PenaltiesBiasAndListsChangeWhatIsDrawn) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  const std::vector<int32_t> plain = TokensOf(*engine, [](GenerateRequest&) {});
  const int32_t first = plain[0];
  EXPECT_EQ(TokensOf(*engine, [](GenerateRequest& r) { r.sampling.repetition_penalty = 1.0f; }), plain);

  const std::vector<int32_t> once = TokensOf(*engine, [](GenerateRequest& r) { r.sampling.presence_penalty = 100; });
  EXPECT_EQ(std::set<int32_t>(once.begin(), once.end()).size(), once.size()) << "nothing is drawn twice";
  const std::vector<int32_t> spaced = TokensOf(*engine, [](GenerateRequest& r) {
    r.sampling.presence_penalty = 100;
    r.sampling.penalty_window = 4;
  });
  for (size_t i = 1; i < spaced.size(); ++i) {
    EXPECT_EQ(std::count(spaced.begin() + static_cast<int64_t>(i < 4 ? 0 : i - 4), spaced.begin() + static_cast<int64_t>(i), spaced[i]), 0)
        << "not within four tokens";
  }
  EXPECT_LT(std::set<int32_t>(spaced.begin(), spaced.end()).size(), spaced.size()) << "but beyond them";

  EXPECT_EQ(TokensOf(*engine, [](GenerateRequest& r) { r.sampling.logit_bias = {{42, 1000.0f}}; }), std::vector<int32_t>(30, 42));
  const std::vector<int32_t> banned = TokensOf(*engine, [&](GenerateRequest& r) { r.sampling.banned_token_ids = {first}; });
  EXPECT_EQ(std::count(banned.begin(), banned.end(), first), 0);
  for (int32_t token : TokensOf(*engine, [](GenerateRequest& r) {
         r.sampling.temperature = 2;
         r.sampling.allowed_token_ids = {10, 200, 33};
       })) {
    EXPECT_TRUE(token == 10 || token == 200 || token == 33) << token;
  }
  EXPECT_EQ(TokensOf(*engine, [](GenerateRequest& r) { r.sampling = {.temperature = 1.5f, .seed = 3u, .min_p = 1.0f}; }), plain)
      << "only the likeliest is left";
}

TEST(EngineTest, MinTokensHoldsBackWhatStops) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  const std::vector<int32_t> plain = TokensOf(*engine, [](GenerateRequest&) {});
  const auto stop_at_third = [&](GenerateRequest& r) { r.stop.token_ids = {plain[2]}; };
  EXPECT_LE(TokensOf(*engine, stop_at_third).size(), 3u);
  const std::vector<int32_t> held = TokensOf(*engine, [&](GenerateRequest& r) {
    stop_at_third(r);
    r.stop.min_tokens = 10;
  });
  EXPECT_GE(held.size(), 10u);
  EXPECT_EQ(std::count(held.begin(), held.begin() + 10, plain[2]), 0);
}

TEST(EngineTest, TopLogprobsAreTheModelsOwnBesideEachToken) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  for (const bool biased : {false, true}) {
    GenerateRequest request = GreedyRequest({1, 2, 3}, 8);
    request.top_logprobs = 3;
    if (biased) request.sampling.logit_bias = {{42, 1000.0f}};
    const Generated generated = Generate(*engine, request);
    ASSERT_EQ(generated.top_logprobs.size(), 8u);
    for (size_t i = 0; i < 8; ++i) {
      const std::vector<TokenLogprob>& top = generated.top_logprobs[i];
      ASSERT_EQ(top.size(), 3u);
      EXPECT_GE(top[0].logprob, top[1].logprob);
      EXPECT_GE(top[1].logprob, top[2].logprob);
      if (biased) {
        EXPECT_EQ(generated.token_ids[i], 42);
        EXPECT_LE(generated.logprobs[i], top[0].logprob) << "of the distribution before the bias";
      } else {
        EXPECT_EQ(top[0].token_id, generated.token_ids[i]);
        EXPECT_EQ(top[0].logprob, generated.logprobs[i]);
      }
    }
  }
}

TEST(EngineTest, WrongLogitChangesNameFieldValueAndLimit) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  const auto error = [&](const std::function<void(GenerateRequest&)>& change) {
    GenerateRequest request = GreedyRequest({1, 2, 3}, 5);
    change(request);
    const absl::Status status = Generate(*engine, request).finished.status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(error([&](auto& r) { r.sampling.min_p = nan; }), "min_p: nan is not in [0, 1]");
  EXPECT_EQ(error([](auto& r) { r.sampling.typical_p = 0.0f; }), "typical_p: 0 is not in (0, 1]");
  EXPECT_EQ(error([](auto& r) { r.sampling.repetition_penalty = -1.0f; }), "repetition_penalty: -1 is not in (0, 100]");
  EXPECT_EQ(error([](auto& r) { r.sampling.presence_penalty = 101; }), "presence_penalty: 101 is not in [-100, 100]");
  EXPECT_EQ(error([&](auto& r) { r.sampling.frequency_penalty = nan; }), "frequency_penalty: nan is not in [-100, 100]");
  EXPECT_EQ(error([](auto& r) { r.sampling.penalty_window = -1; }), "penalty_window: -1 is not at least 0");
  EXPECT_EQ(error([](auto& r) { r.sampling.logit_bias = {{5, 2000.0f}}; }), "logit_bias[5]: 2000 is not in [-1000, 1000]");
  EXPECT_EQ(error([](auto& r) { r.sampling.logit_bias = {{-5, 0.0f}}; }), "logit_bias: id -5 at index 0 is not in [0, 258)");
  EXPECT_EQ(error([](auto& r) { r.sampling.banned_token_ids.assign(1025, 1); }), "banned_token_ids: has 1025 ids; at most 1024 are accepted");
  EXPECT_EQ(error([](auto& r) { r.sampling.allowed_token_ids = {258}; }), "allowed_token_ids: id 258 at index 0 is not in [0, 258)");
  EXPECT_THAT(error([](auto& r) { r.sampling.allowed_token_ids = r.sampling.banned_token_ids = {3}; }), HasSubstr("nothing to draw"));
  EXPECT_EQ(error([](auto& r) { r.stop.min_tokens = 6; }), "min_tokens: 6 is not in [0, 5]");
  EXPECT_EQ(error([](auto& r) { r.top_logprobs = 21; }), "top_logprobs: 21 is not in [0, 20]");
  EXPECT_EQ(error([](auto& r) { r.scheduling.priority = 1001; }), "scheduling.priority: 1001 is not in [-1000, 1000]");
}

TEST(EngineTest, APromptSeenBeforeIsFoundAndCountedUnderItsOwnSaltAndMemoryMode) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  const std::vector<int32_t> prompt(50, 7);
  const auto cached_tokens = [&](const std::function<void(GenerateRequest&)>& change) {
    GenerateRequest request = GreedyRequest(prompt, 3);
    change(request);
    return Generate(*engine, request).finished.value().usage.cached_tokens;
  };
  const auto as_it_is = [](GenerateRequest&) {};
  EXPECT_EQ(cached_tokens([](GenerateRequest& r) { r.scheduling.prefix_cache = false; }), 0);
  EXPECT_EQ(cached_tokens(as_it_is), 0) << "who keeps out of the cache leaves nothing there";
  EXPECT_EQ(cached_tokens(as_it_is), 48);
  EXPECT_EQ(cached_tokens([](GenerateRequest& r) { r.scheduling.prefix_cache = false; }), 0);
  EXPECT_EQ(cached_tokens([](GenerateRequest& r) { r.scheduling.cache_salt = "b"; }), 0);
  EXPECT_EQ(cached_tokens([](GenerateRequest& r) { r.memory.enabled = false; }), 0);
  EXPECT_EQ(cached_tokens([](GenerateRequest& r) { r.prompt = std::vector<int32_t>(32, 7); }), 16) << "the last token is computed";
  EXPECT_EQ(engine->load().cached_tokens, 64);
  EXPECT_GT(engine->load().kv_pages_cached, 0);
}

TEST(EngineTest, ContinuationsShareTheirContextAndScoreAsTheyDoAlone) {
  EngineOptions options = Options("A");
  options.max_batch_tokens = 16;
  const std::unique_ptr<Engine> engine = Start(options);
  ScoreRequest request;
  std::vector<int32_t> context;
  for (int i = 0; i < 70; ++i) context.push_back(i * 31 % 250);
  request.context = context;
  request.continuations = {std::vector<int32_t>{1, 2, 3}, std::vector<int32_t>{4}, std::vector<int32_t>{1, 2, 9, 9}};
  const int64_t before = engine->load().prompt_tokens;
  const ScoreResult together = Score(*engine, request).value();
  EXPECT_LT(engine->load().prompt_tokens - before, 70 + 3 * 20) << "the context is computed once";
  for (size_t i = 0; i < request.continuations.size(); ++i) {
    ScoreRequest one = request;
    one.continuations = {request.continuations[i]};
    one.scheduling.prefix_cache = false;
    const ScoreResult alone = Score(*engine, one).value();
    EXPECT_EQ(together.scores[i].token_logprobs, alone.scores[0].token_logprobs);
    EXPECT_EQ(alone.usage.cached_tokens, 0);
  }
  EXPECT_EQ(Score(*engine, request)->usage.cached_tokens, 64);
}

TEST(EngineTest, AHigherPriorityIsAnsweredBeforeWhatWaits) {
  EngineOptions options = Options("A");
  options.max_sequences = 1;
  const std::unique_ptr<Engine> engine = Start(options);
  std::vector<std::shared_ptr<Collector>> low;
  for (int i = 0; i < 8; ++i) {
    low.push_back(std::make_shared<Collector>());
    engine->Generate(GreedyRequest({1, 2, i}, 100), low.back());
  }
  GenerateRequest urgent = GreedyRequest({9, 9}, 2);
  urgent.scheduling.priority = 5;
  const Generated answer = Generate(*engine, urgent);
  EXPECT_TRUE(answer.finished.ok());
  EXPECT_GE(engine->load().requests, 2) << "most of the others are still at it";
  for (const auto& collector : low) {
    const Generated& generated = collector->Wait();
    EXPECT_TRUE(generated.finished.ok());
    EXPECT_EQ(generated.token_ids.size(), 100u) << "preempted, not cut short";
  }
}

TEST(EngineTest, WhatCannotBeDoneInTimeOrWouldWaitTooLongIsRefusedOnArrival) {
  EngineOptions options = Options("A");
  options.max_sequences = 1;
  options.max_waiting_tokens = 400;
  const std::unique_ptr<Engine> engine = Start(options);
  Generate(*engine, GreedyRequest(std::vector<int32_t>(200, 3), 1));  // from here on the engine knows what a prompt costs
  auto running = std::make_shared<Collector>();
  engine->Generate(GreedyRequest({1}, 250), running);
  std::vector<GenerateRequest> requests(6, GreedyRequest(std::vector<int32_t>(200, 4), 1));
  const std::vector<Generated> answers = GenerateAll(*engine, requests);
  int refused = 0;
  for (const Generated& answer : answers) {
    if (answer.finished.ok()) continue;
    ++refused;
    EXPECT_EQ(answer.finished.status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(answer.finished.status().message()), HasSubstr("max_waiting_tokens: "));
    EXPECT_TRUE(RetryAfter(answer.finished.status()).has_value());
  }
  EXPECT_GE(refused, 1);
  running->Wait();

  GenerateRequest hurried = GreedyRequest(std::vector<int32_t>(250, 5), 1);
  hurried.deadline = absl::Now() + absl::Microseconds(300);
  const absl::Status late = Generate(*engine, hurried).finished.status();
  EXPECT_EQ(late.code(), absl::StatusCode::kDeadlineExceeded);
  ExpectNoPagesLeft(*engine);
}

TEST(EngineTest, TheSameIdTwiceIsRefusedWhileTheFirstRuns) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  GenerateRequest request = GreedyRequest({1, 2, 3}, 250);
  request.id = "mine";
  auto first = std::make_shared<Collector>();
  engine->Generate(request, first);
  const absl::Status second = Generate(*engine, request).finished.status();
  EXPECT_EQ(second.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(second.message()), HasSubstr("mine"));
  EXPECT_TRUE(first->Wait().finished.ok());
  EXPECT_TRUE(Generate(*engine, request).finished.ok());
}

TEST(EngineTest, AFullQueueRefusesAtOnce) {
  EngineOptions options = Options("A");
  options.max_sequences = 1;
  options.max_waiting = 2;
  const std::unique_ptr<Engine> engine = Start(options);
  std::vector<GenerateRequest> requests(10, GreedyRequest({1, 2, 3}, 250));
  int refused = 0;
  for (const Generated& generated : GenerateAll(*engine, requests)) {
    if (generated.finished.ok()) continue;
    EXPECT_EQ(generated.finished.status().code(), absl::StatusCode::kResourceExhausted);
    ++refused;
  }
  EXPECT_GE(refused, 1);
  EXPECT_LE(refused, 7);
  ExpectNoPagesLeft(*engine);
}

TEST(EngineTest, DrainFinishesWhatRunsAndRefusesTheRest) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  auto running = std::make_shared<Collector>();
  engine->Generate(GreedyRequest({1, 2, 3}, 250), running);
  std::thread drain([&] { engine->Drain(absl::Seconds(60)); });
  while (!engine->load().draining) std::this_thread::yield();
  EXPECT_EQ(Generate(*engine, GreedyRequest({1}, 1)).finished.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(running->Wait().finished.ok());
  drain.join();
}

TEST(EngineTest, DrainEndsWhatOutlastsItsLimit) {
  const std::unique_ptr<Engine> engine = Start(Options("A"));
  std::vector<std::shared_ptr<Collector>> collectors;
  for (int i = 0; i < 64; ++i) {
    collectors.push_back(std::make_shared<Collector>());
    engine->Generate(GreedyRequest({1, 2, 3}, 250), collectors.back());
  }
  engine->Drain(absl::ZeroDuration());
  int ended = 0;
  for (const auto& collector : collectors) ended += collector->Wait().finished.status().code() == absl::StatusCode::kUnavailable;
  EXPECT_GE(ended, 1);
  ExpectNoPagesLeft(*engine);
}

TEST(EngineTest, DestructionEndsWhatRuns) {
  std::unique_ptr<Engine> engine = Start(Options("A"));
  std::vector<std::shared_ptr<Collector>> collectors;
  for (int i = 0; i < 64; ++i) {
    collectors.push_back(std::make_shared<Collector>());
    engine->Generate(GreedyRequest({1, 2, 3}, 250), collectors.back());
  }
  engine.reset();
  for (const auto& collector : collectors) {
    const Generated generated = collector->Wait();
    if (generated.finished.ok()) continue;
    EXPECT_EQ(generated.finished.status().code(), absl::StatusCode::kUnavailable);
  }
}

TEST(EngineTest, APlanThatDoesNotFitSaysWhatWould) {
  EngineOptions options = Options("A");
  options.memory_limit_bytes = 16 << 20;
  options.kv_cache_bytes = 64 << 20;
  const absl::Status status = Engine::Create(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), ::testing::ContainsRegex("the plan needs .* MiB.*16.0 MiB are available; --kv_cache_bytes=[0-9]+ would fit"));
  const std::string message(status.message());
  const size_t at = message.find("--kv_cache_bytes=") + 17;
  options.kv_cache_bytes = std::stoll(message.substr(at));
  EXPECT_TRUE(Engine::Create(options).ok()) << "the advice holds";
}

TEST(EngineTest, TheCacheTakesAPartOfWhatIsFreeBesideTheRest) {
  EngineOptions options = Options("A");
  options.memory_limit_bytes = 64 << 20;
  options.kv_cache_fraction = 0.5;
  const int64_t half = Start(options)->load().kv_pages_total;
  options.kv_cache_fraction = 1;
  const int64_t all = Start(options)->load().kv_pages_total;
  EXPECT_NEAR(static_cast<double>(all), 2.0 * static_cast<double>(half), 1);
  EXPECT_GT(all, 1000) << "of 24 KiB, with some 8 MiB for all else";
  const auto error = [&](double fraction, int64_t bytes) {
    options.kv_cache_fraction = fraction;
    options.kv_cache_bytes = bytes;
    return std::string(Engine::Create(options).status().message());
  };
  EXPECT_EQ(error(1.5, 0), "kv_cache_fraction: 1.5 is not in [0, 1]");
  EXPECT_EQ(error(std::numeric_limits<double>::quiet_NaN(), 0), "kv_cache_fraction: nan is not in [0, 1]");
  EXPECT_EQ(error(0.5, 1 << 20), "kv_cache_fraction: kv_cache_bytes says how much; give one of them");
  EXPECT_THAT(error(1e-9, 0), HasSubstr("is less than one page, 24.0 KiB"));
}

TEST(EngineTest, ADryRunPlansAndStops) {
  EngineOptions options = Options("A");
  options.dry_run = true;
  const absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(options);
  ASSERT_TRUE(engine.ok());
  EXPECT_EQ(*engine, nullptr);
}

TEST(EngineTest, WrongOptionsAreNamed) {
  const auto error = [](const std::function<void(EngineOptions&)>& change) {
    EngineOptions options = Options("A");
    change(options);
    return std::string(Engine::Create(options).status().message());
  };
  EXPECT_THAT(error([](auto& o) { o.checkpoint = "/nowhere"; }), HasSubstr("/nowhere/config.json"));
  EXPECT_THAT(error([](auto& o) { o.kv_page_size = 24; }), HasSubstr("kv_page_size: 24 is not a multiple of 16"));
  EXPECT_THAT(error([](auto& o) { o.max_context_tokens = 257; }), HasSubstr("max_context_tokens: 257 is not in [0, 256]"));
  EXPECT_THAT(error([](auto& o) { o.backend = "cuda"; }), HasSubstr("backend: 'cuda'"));
  EXPECT_THAT(error([](auto& o) { o.devices = {0, 0}; }), HasSubstr("devices: each must be a different number"));
  EXPECT_THAT(error([](auto& o) { o.weight_dtype = "int3"; }), HasSubstr("weight_dtype: 'int3' is not one of auto, f32, bf16"));
  EXPECT_THAT(error([](auto& o) { o.activation_dtype = "bf16"; }), HasSubstr("activation_dtype: bf16 needs weight_dtype bf16"));
  EXPECT_THAT(error([](auto& o) { o.isa = "MMX"; }), HasSubstr("MMX"));
  EXPECT_THAT(error([](auto& o) { o.kv_cache_bytes = 100; }), HasSubstr("kv_cache_bytes: 100 is less than one page"));
}

}  // namespace
}  // namespace memserve::engine
