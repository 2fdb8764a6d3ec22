// The rows that fired, told beside the tokens.

#include "engine/memory_trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "engine/engine.h"
#include "tests/support/collector.h"
#include "tests/support/engines.h"
#include "tests/support/golden.h"

namespace memserve::engine {

// Bit for bit.
bool operator==(const LayerTrace& a, const LayerTrace& b) {
  return a.layer == b.layer && a.heads == b.heads && a.rows == b.rows && a.weights == b.weights;
}
bool operator==(const TokenTrace& a, const TokenTrace& b) {
  return a.position == b.position && a.token_id == b.token_id && a.layers == b.layers;
}
void PrintTo(const TokenTrace& trace, std::ostream* out) {
  *out << "position " << trace.position << " of token " << trace.token_id;
}

namespace {

using ::testing::ElementsAre;
using testing::Generate;
using testing::GenerateAll;
using testing::Generated;
using testing::GoldenCase;
using ::testing::IsEmpty;
using testing::LoadGolden;
using testing::ParityOptions;
using testing::Start;

GenerateRequest Request(const std::vector<int32_t>& prompt, int max_tokens, const MemoryTraceParams& trace) {
  GenerateRequest request;
  request.prompt = prompt;
  request.stop = {.max_tokens = max_tokens, .ignore_eos = true};
  request.logprobs = true;
  request.memory_trace = trace;
  return request;
}

std::vector<int32_t> LongPrompt(int tokens) {
  std::vector<int32_t> prompt;
  for (int i = 0; i < tokens; ++i) prompt.push_back((i * 37 + 11) % 256);
  return prompt;
}

std::vector<int32_t> PositionsOf(const Generated& generated) {
  std::vector<int32_t> positions;
  for (const TokenTrace& trace : generated.memory_traces) positions.push_back(trace.position);
  return positions;
}

TEST(MemoryTraceTest, RowsAndWeightsOfAPromptAreThoseOfTheOriginal) {
  for (const char* name : {"A", "B", "D", "H"}) {
    const GoldenCase golden = LoadGolden(name);
    for (int ranks : {1, 2}) {
      EngineOptions options = ParityOptions(golden.checkpoint);
      if (ranks == 2) options.devices = {0, 1};
      const std::unique_ptr<Engine> engine = Start(options);
      const int heads = engine->model().mem_heads, knn = engine->model().mem_knn;
      for (const auto& sequence : golden.sequences) {
        const Generated found = Generate(*engine, Request(sequence.tokens, 1, {.tokens = 0, .prompt_tokens = 1000}));
        ASSERT_TRUE(found.finished.ok()) << found.finished.status();
        ASSERT_EQ(found.memory_traces.size(), sequence.tokens.size());
        for (size_t m = 0; m < golden.memory_layers.size(); ++m) {
          const std::string prefix = sequence.name + ".layer" + std::to_string(golden.memory_layers[m]) + ".memory.";
          const std::vector<int32_t> rows = golden.Ints(prefix + "indices");
          const std::vector<float> weights = golden.Floats(prefix + "weights");
          for (size_t t = 0; t < sequence.tokens.size(); ++t) {
            const TokenTrace& trace = found.memory_traces[t];
            ASSERT_EQ(trace.position, static_cast<int32_t>(t));
            ASSERT_EQ(trace.token_id, sequence.tokens[t]);
            const LayerTrace& layer = trace.layers.at(m);
            ASSERT_EQ(layer.layer, golden.memory_layers[m]);
            ASSERT_EQ(layer.rows.size(), static_cast<size_t>(heads * knn));
            std::map<std::pair<int32_t, int32_t>, float> by_row;
            for (size_t i = 0; i < layer.rows.size(); ++i) by_row[{layer.heads[i], layer.rows[i]}] = layer.weights[i];
            for (int i = 0; i < heads * knn; ++i) {
              const size_t at = t * heads * knn + i;
              const auto entry = by_row.find({i / knn, rows[at]});
              ASSERT_TRUE(entry != by_row.end()) << prefix << " token " << t << " row " << rows[at];
              EXPECT_NEAR(entry->second, weights[at], 1e-5) << prefix << " token " << t << " row " << rows[at];
            }
          }
        }
      }
    }
  }
}

TEST(MemoryTraceTest, ATokensTraceIsThatOfThePassItWasDrawnFrom) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(ParityOptions(golden.checkpoint));
  const std::vector<int32_t> prompt = LongPrompt(20);
  const Generated drawn = Generate(*engine, Request(prompt, 6, {.tokens = 4, .prompt_tokens = 3}));
  EXPECT_THAT(PositionsOf(drawn), ElementsAre(17, 18, 19, 20, 21, 22)) << "the prompt's last three, and three of the four drawn";
  std::vector<int32_t> all = prompt;
  all.insert(all.end(), drawn.token_ids.begin(), drawn.token_ids.end());
  for (const TokenTrace& trace : drawn.memory_traces) EXPECT_EQ(trace.token_id, all[trace.position]);
  // The same tokens as a prompt.
  const Generated again = Generate(*engine, Request(all, 1, {.tokens = 0, .prompt_tokens = 9}));
  ASSERT_THAT(PositionsOf(again), ElementsAre(17, 18, 19, 20, 21, 22, 23, 24, 25));
  for (size_t i = 0; i < drawn.memory_traces.size(); ++i) EXPECT_EQ(drawn.memory_traces[i], again.memory_traces[i]);

  EXPECT_THAT(PositionsOf(Generate(*engine, Request(prompt, 3, {}))), ElementsAre(19, 20, 21)) << "all that are drawn";
  EXPECT_THAT(PositionsOf(Generate(*engine, Request(prompt, 3, {.tokens = 1}))), ElementsAre(19));
  EXPECT_THAT(PositionsOf(Generate(*engine, Request(prompt, 3, {.tokens = 0}))), IsEmpty());
  EXPECT_THAT(PositionsOf(Generate(*engine, Request(prompt, 3, {.tokens = 50, .prompt_tokens = 2}))), ElementsAre(18, 19, 20, 21));
}

TEST(MemoryTraceTest, TellsTheLargestEntriesOfTheLayersAskedFor) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(ParityOptions(golden.checkpoint));
  const Generated all = Generate(*engine, Request(LongPrompt(9), 4, {}));
  const Generated some = Generate(*engine, Request(LongPrompt(9), 4, {.entries = 2, .layers = {4}}));
  ASSERT_EQ(some.memory_traces.size(), 4u);
  for (size_t t = 0; t < 4; ++t) {
    ASSERT_EQ(some.memory_traces[t].layers.size(), 1u);
    const LayerTrace& layer = some.memory_traces[t].layers[0];
    EXPECT_EQ(layer.layer, 4);
    for (int head = 0; head < engine->model().mem_heads; ++head) {
      std::vector<std::pair<float, int32_t>> full, told;
      const LayerTrace& whole = all.memory_traces[t].layers[1];
      for (size_t i = 0; i < whole.rows.size(); ++i) {
        if (whole.heads[i] == head) full.emplace_back(-whole.weights[i], whole.rows[i]);
      }
      for (size_t i = 0; i < layer.rows.size(); ++i) {
        if (layer.heads[i] == head) told.emplace_back(-layer.weights[i], layer.rows[i]);
      }
      std::sort(full.begin(), full.end());
      full.resize(2);
      std::sort(told.begin(), told.end());
      EXPECT_EQ(told, full) << "token " << t << ", head " << head;
    }
  }
}

TEST(MemoryTraceTest, WhatDoesNotFireIsNotTold) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(ParityOptions(golden.checkpoint));
  GenerateRequest request = Request(LongPrompt(9), 2, {});
  const Generated all = Generate(*engine, request);
  request.memory.masked_rows = {all.memory_traces[0].layers[0].rows[0], all.memory_traces[0].layers[0].rows[3]};
  for (const TokenTrace& trace : Generate(*engine, request).memory_traces) {
    for (const LayerTrace& layer : trace.layers) {
      for (int32_t row : request.memory.masked_rows) EXPECT_EQ(std::count(layer.rows.begin(), layer.rows.end(), row), 0);
    }
  }
  request.memory = {.knn = 2, .layers = {1}};
  const Generated fewer = Generate(*engine, request);
  EXPECT_EQ(fewer.memory_traces[0].layers[0].rows.size(), 2u * engine->model().mem_heads);
  EXPECT_THAT(fewer.memory_traces[0].layers[1].rows, IsEmpty());
  request.memory = {.enabled = false};
  const Generated off = Generate(*engine, request);
  ASSERT_EQ(off.memory_traces.size(), 2u);
  EXPECT_THAT(off.memory_traces[0].layers[0].rows, IsEmpty());
  EXPECT_THAT(off.memory_traces[0].layers[1].weights, IsEmpty());
}

// Like AnswersDependOnTheRequestAlone: a trace is part of the answer.
TEST(MemoryTraceTest, ATraceIsTheSameHoweverStepsAreCut) {
  const GoldenCase golden = LoadGolden("A");
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 12; ++i) {
    requests.push_back(Request(LongPrompt(20 + 3 * i), 10 + 2 * i, {.prompt_tokens = i % 3 == 0 ? 5 * i : 0}));
    if (i % 4 == 1) requests.back().memory_trace->tokens = i;
    if (i % 4 == 3) requests.back().memory.knn = 2;
    if (i % 5 == 4) requests.back().memory_trace.reset();
  }
  EngineOptions options = ParityOptions(golden.checkpoint);
  std::vector<Generated> expected;
  {
    const std::unique_ptr<Engine> engine = Start(options);
    for (GenerateRequest request : requests) {
      request.scheduling.prefix_cache = false;
      expected.push_back(Generate(*engine, request));
      ASSERT_TRUE(expected.back().finished.ok()) << expected.back().finished.status();
      ASSERT_EQ(expected.back().memory_traces.empty(), !request.memory_trace.has_value());
    }
  }
  for (const auto& [name, batch_tokens, depth, cache_bytes, speculative] :
       std::vector<std::tuple<std::string, int, int, int64_t, bool>>{
           {"together", 512, 1, 0, false},
           {"one token a step", 1, 1, 0, false},
           {"small chunks", 7, 1, 0, false},
           {"two steps in flight", 9, 2, 0, false},
           {"preempted", 64, 1, 3 << 16, false},
           {"preempted, two in flight", 9, 2, 3 << 16, false},
           {"speculative", 512, 1, 0, true},
           {"speculative, preempted, two in flight", 30, 2, 3 << 16, true}}) {
    if (speculative) {
      for (GenerateRequest& request : requests) request.speculation = SpeculationParams{.min_ngram = 1};
    }
    options.max_batch_tokens = batch_tokens;
    options.step_depth = depth;
    options.kv_cache_bytes = cache_bytes;
    const std::unique_ptr<Engine> engine = Start(options);
    for (int round = 0; round < 2 || (cache_bytes > 0 && engine->load().preemptions == 0 && round < 100); ++round) {
      // Where pages are few, somebody who holds many of them and gives way.
      const auto hog = std::make_shared<memserve::testing::Collector>();
      if (cache_bytes > 0) {
        GenerateRequest request = Request(LongPrompt(64), 60, {});
        request.memory_trace.reset();
        request.scheduling = {.priority = -1, .prefix_cache = false};
        engine->Generate(request, hog);
        hog->WaitForFirstDelta();
      }
      const std::vector<Generated> found = GenerateAll(*engine, requests);
      if (cache_bytes > 0) {
        EXPECT_TRUE(hog->Wait().finished.ok());
      }
      for (size_t i = 0; i < requests.size(); ++i) {
        EXPECT_EQ(found[i], expected[i]) << name << ", request " << i;
        EXPECT_EQ(found[i].memory_traces, expected[i].memory_traces) << name << ", request " << i << ", round " << round;
      }
    }
    if (cache_bytes > 0) {
      EXPECT_GT(engine->load().preemptions, 0);
    } else {
      EXPECT_GT(engine->load().cached_tokens, 0);
    }
  }
}

TEST(MemoryTraceTest, EachChoiceHasItsOwnTracesAndTheFirstThoseOfThePrompt) {
  const GoldenCase golden = LoadGolden("A");
  EngineOptions options = ParityOptions(golden.checkpoint);
  std::unique_ptr<Engine> engine = Start(options);
  GenerateRequest request = Request(LongPrompt(40), 5, {.prompt_tokens = 4});
  request.sampling = {.temperature = 1.0f, .seed = 3u};
  request.n = 3;
  const auto all = [&] {
    auto collector = std::make_shared<testing::Collector>();
    engine->Generate(request, collector);
    return collector->WaitForAll();
  };
  const std::vector<Generated> choices = all();
  ASSERT_EQ(choices.size(), 3u);
  EXPECT_THAT(PositionsOf(choices[0]), ElementsAre(36, 37, 38, 39, 40, 41, 42, 43));
  for (const Generated& choice : choices) {
    const size_t before = choice.memory_traces.size() - 5;
    EXPECT_EQ(choice.memory_traces[before], choices[0].memory_traces[3]) << "of the pass that all of them are drawn from";
    for (size_t i = 0; i < 4; ++i) EXPECT_EQ(choice.memory_traces[before + 1 + i].token_id, choice.token_ids[i]);
  }
  EXPECT_THAT(PositionsOf(choices[2]), ElementsAre(39, 40, 41, 42, 43));

  options.max_trace_entries = 3 * 2 * 2 * engine->model().mem_heads * engine->model().mem_knn;
  engine = Start(options);
  request.memory_trace = MemoryTraceParams{};
  for (const Generated& choice : all()) EXPECT_EQ(choice.memory_traces.size(), 2u) << "the bound is shared";
}

TEST(MemoryTraceTest, WrongTracesAndTooLargeOnesNameTheLimit) {
  const GoldenCase golden = LoadGolden("A");
  EngineOptions options = ParityOptions(golden.checkpoint);
  std::unique_ptr<Engine> engine = Start(options);
  const int heads = engine->model().mem_heads, knn = engine->model().mem_knn, of_token = 2 * heads * knn;
  const auto error = [&](const MemoryTraceParams& trace) {
    return std::string(Generate(*engine, Request(LongPrompt(30), 20, trace)).finished.status().message());
  };
  const std::string all = std::to_string(knn);
  EXPECT_EQ(error({.tokens = -1}), "memory_trace.tokens: -1 is not at least 0");
  EXPECT_EQ(error({.prompt_tokens = -5}), "memory_trace.prompt_tokens: -5 is not at least 0");
  EXPECT_EQ(error({.entries = 0}), "memory_trace.entries: 0 is not in [1, " + all + "]");
  EXPECT_EQ(error({.entries = 1000}), "memory_trace.entries: 1000 is not in [1, " + all + "]");
  EXPECT_EQ(error({.layers = {2}}), "memory_trace.layers: layer 2 has no memory; these do: 1, 4");
  EXPECT_EQ(error({.layers = {1, 1, 1}}), "memory_trace.layers: has 3 entries; the model has 2 memory layers");

  options.max_trace_entries = 10 * of_token + 1;
  engine = Start(options);
  EXPECT_EQ(error({.tokens = 10}), "");
  EXPECT_EQ(error({.tokens = 11}), "memory_trace: 11 tokens of 2 layers, " + std::to_string(heads) + " heads and " + all +
                                       " entries are " + std::to_string(11 * of_token) + " entries; at most " +
                                       std::to_string(10 * of_token + 1) + " are told (10 tokens)");
  EXPECT_EQ(error({.tokens = 3, .prompt_tokens = 8}), "");
  EXPECT_THAT(error({.tokens = 4, .prompt_tokens = 8}), ::testing::HasSubstr("11 tokens of 2 layers"));
  EXPECT_EQ(error({.tokens = 20, .entries = knn / 2}), "");
  EXPECT_EQ(Generate(*engine, Request(LongPrompt(30), 20, {})).memory_traces.size(), 10u) << "unset: as far as the limit goes";
  EXPECT_EQ(Generate(*engine, Request(LongPrompt(30), 20, {.prompt_tokens = 4})).memory_traces.size(), 10u);

  const std::unique_ptr<Engine> dense = Start(ParityOptions(LoadGolden("E").checkpoint));
  const absl::Status status = Generate(*dense, Request({1, 2}, 2, {})).finished.status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(status.message(), "memory_trace: the model has no memory layers");
}

}  // namespace
}  // namespace memserve::engine
