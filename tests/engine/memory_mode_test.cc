// Memory under the caller's control: fewer rows, chosen layers, masked rows.

#include "engine/memory_mode.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <set>

#include "engine/engine.h"
#include "tests/support/collector.h"
#include "tests/support/engines.h"
#include "tests/support/files.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using testing::Generate;
using testing::GenerateAll;
using testing::Generated;
using testing::GoldenCase;
using testing::LoadGolden;
using testing::ParityOptions;
using testing::Score;
using testing::Start;

EngineOptions Options(const std::string& checkpoint, int ranks = 1, const std::string& backend = "cpu") {
  EngineOptions options = ParityOptions(checkpoint);
  options.backend = backend;
  options.devices.clear();
  for (int r = 0; r < ranks; ++r) options.devices.push_back(r);
  return options;
}

GenerateRequest Request(const GoldenCase& golden, const MemoryMode& memory, size_t sequence = 0) {
  GenerateRequest request;
  request.prompt = golden.sequences[sequence % golden.sequences.size()].tokens;
  request.stop = {.max_tokens = 24, .ignore_eos = true};
  request.logprobs = true;
  request.memory = memory;
  return request;
}

std::vector<int32_t> EveryThirdRow(int64_t rows) {
  std::vector<int32_t> masked;
  for (int32_t row = 0; row < rows && masked.size() < kMaxMaskedRows; row += 3) masked.push_back(row);
  return masked;
}

TEST(MemoryModeTest, AllRowsOfAllLayersAreWhatIsDoneUnasked) {
  for (const char* name : {"A", "B", "D", "H"}) {
    const GoldenCase golden = LoadGolden(name);
    const std::unique_ptr<Engine> engine = Start(Options(golden.checkpoint));
    GenerateRequest all = Request(golden, {.knn = engine->model().mem_knn, .layers = golden.memory_layers});
    EXPECT_EQ(Generate(*engine, all), Generate(*engine, Request(golden, {}))) << name;
    // A row that does not exist twice is masked once.
    all.memory = {.masked_rows = {5, 3, 5}};
    const Generated twice = Generate(*engine, all);
    all.memory = {.masked_rows = {3, 5}};
    EXPECT_EQ(Generate(*engine, all), twice) << name;
  }
}

TEST(MemoryModeTest, EachModeGivesAnAnswerOfItsOwnAndBesideOthersTheSame) {
  for (const char* name : {"A", "B"}) {
    const GoldenCase golden = LoadGolden(name);
    const std::unique_ptr<Engine> engine = Start(Options(golden.checkpoint));
    std::vector<MemoryMode> modes = {{}, {.enabled = false}, {.knn = 1}, {.knn = 2}, {.masked_rows = EveryThirdRow(1 << 20)}};
    for (int layer : golden.memory_layers) modes.push_back({.layers = {layer}});
    if (name == std::string("B"))
      modes.back().masked_rows = {}, modes[4].masked_rows = EveryThirdRow(400);
    else
      modes[4].masked_rows = EveryThirdRow(1024);
    std::vector<GenerateRequest> requests;
    std::vector<Generated> alone;
    std::set<std::vector<float>> answers;
    for (const MemoryMode& mode : modes) {
      requests.push_back(Request(golden, mode));
      alone.push_back(Generate(*engine, requests.back()));
      ASSERT_TRUE(alone.back().finished.ok()) << alone.back().finished.status();
      answers.insert(alone.back().logprobs);
    }
    EXPECT_EQ(answers.size(), modes.size()) << name << ": two modes gave the same logprobs";
    EXPECT_EQ(GenerateAll(*engine, requests), alone) << name;
  }
}

TEST(MemoryModeTest, APromptIsFoundAgainUnderItsOwnModeAlone) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(Options(golden.checkpoint));
  std::vector<int32_t> prompt;
  for (int i = 0; i < 70; ++i) prompt.push_back((i * 37 + 11) % 256);
  const std::vector<MemoryMode> modes = {{},
                                         {.enabled = false},
                                         {.knn = 2},
                                         {.layers = {1}},
                                         {.layers = {4}},
                                         {.knn = 2, .layers = {4}},
                                         {.masked_rows = EveryThirdRow(1024)},
                                         {.masked_rows = EveryThirdRow(900)}};
  std::vector<Generated> uncached;
  for (int round = 0; round < 3; ++round) {
    for (size_t m = 0; m < modes.size(); ++m) {
      GenerateRequest request = Request(golden, modes[m]);
      request.prompt = prompt;
      request.scheduling.prefix_cache = round > 0;
      const Generated found = Generate(*engine, request);
      if (round == 0) uncached.push_back(found);
      EXPECT_EQ(found, uncached[m]) << "mode " << m << ", round " << round;
      EXPECT_EQ(found.finished->usage.cached_tokens, round < 2 ? 0 : 64) << "mode " << m << ", round " << round;
    }
  }
}

// A golden case's checkpoint with the rows of every table zeroed that are masked.
void CopyWithZeroRows(const std::string& from, const testing::TempFolder& to, const std::vector<int32_t>& masked) {
  std::filesystem::copy(from, to.path());
  std::map<std::string, testing::StoredTensor> tensors = testing::ReadTensors(to / "model.safetensors");
  for (auto& [name, tensor] : tensors) {
    if (name.find(".feed_forward.values") == std::string::npos || !name.ends_with(".weight")) continue;
    const size_t row_bytes = tensor.bytes.size() / tensor.shape[0];
    for (int32_t row : masked) std::fill_n(tensor.bytes.begin() + row * static_cast<int64_t>(row_bytes), row_bytes, '\0');
  }
  testing::WriteTensors(to / "model.safetensors", tensors);
}

TEST(MemoryModeTest, MaskedRowsAreThoseOfATableWhereTheyAreZero) {
  for (const char* name : {"A", "B", "D", "F", "H"}) {
    for (int ranks : {1, 2, 3}) {
      const GoldenCase golden = LoadGolden(name);
      const std::unique_ptr<Engine> engine = Start(Options(golden.checkpoint, ranks));
      const std::vector<int32_t> masked = EveryThirdRow(engine->model().value_tables[0].rows);
      const testing::TempFolder folder;
      CopyWithZeroRows(golden.checkpoint, folder, masked);
      const std::unique_ptr<Engine> zeroed = Start(Options(folder.path(), ranks));
      const Generated found = Generate(*engine, Request(golden, {.masked_rows = masked}));
      EXPECT_EQ(found, Generate(*zeroed, Request(golden, {}))) << name << " on " << ranks;
      EXPECT_FALSE(found == Generate(*engine, Request(golden, {}))) << name << ": no masked row fired";
    }
  }
}

// A batch in which each sequence has a mode of its own.
std::vector<float> LogitsOf(const GoldenCase& golden, const std::string& backend, int ranks) {
  const auto model = testing::LoadModel(Options(golden.checkpoint, ranks, backend));
  const MemoryConfig& memory = model->config.memory;
  std::vector<std::vector<int32_t>> sequences;
  for (int i = 0; i < 6; ++i) {
    const std::vector<int32_t>& tokens = golden.sequences[i % golden.sequences.size()].tokens;
    sequences.emplace_back(tokens.begin(), tokens.begin() + std::min<int64_t>(11, static_cast<int64_t>(tokens.size())));
  }
  Batch batch = testing::PrefillBatch(*model, sequences);
  batch.memory_knn.clear();
  batch.masked_end.clear();
  for (const MemoryMode& mode :
       {MemoryMode{}, MemoryMode{.enabled = false}, MemoryMode{.knn = 2}, MemoryMode{.layers = {memory.layers.back()}},
        MemoryMode{.masked_rows = EveryThirdRow(memory.rows())},
        MemoryMode{.knn = memory.mem_knn - 1, .layers = {memory.layers.front()}, .masked_rows = EveryThirdRow(memory.rows())}}) {
    Resolve(mode, memory).AddTo(batch);
  }
  return model->executor->ExecuteForLogits(batch).value();
}

TEST(MemoryModeTest, AllModesInOneBatchGiveTheLogitsOfTheReference) {
  for (const char* name : {"A", "B", "D", "F", "H"}) {
    const GoldenCase golden = LoadGolden(name);
    const std::vector<float> expected = LogitsOf(golden, "reference", 1);
    for (int ranks : {1, 2, 3}) {
      const std::vector<float> found = LogitsOf(golden, "cpu", ranks);
      ASSERT_EQ(found.size(), expected.size());
      double worst = 0;
      for (size_t i = 0; i < found.size(); ++i) worst = std::max(worst, std::abs(double{found[i]} - double{expected[i]}));
      EXPECT_LT(worst, 1e-4) << name << " on " << ranks;
    }
  }
}

TEST(MemoryModeTest, ScoresTakeTheModeToo) {
  const GoldenCase golden = LoadGolden("A");
  const std::unique_ptr<Engine> engine = Start(Options(golden.checkpoint));
  const GenerateRequest generated = Request(golden, {.knn = 2, .layers = {4}, .masked_rows = EveryThirdRow(1024)});
  const Generated answer = Generate(*engine, generated);
  ScoreRequest request;
  request.context = std::get<std::vector<int32_t>>(generated.prompt);
  request.continuations = {answer.token_ids};
  EXPECT_NE(Score(*engine, request)->scores[0].token_logprobs, answer.logprobs);
  request.memory = generated.memory;
  EXPECT_EQ(Score(*engine, request)->scores[0].token_logprobs, answer.logprobs);
  EXPECT_TRUE(Score(*engine, request)->scores[0].is_greedy);
}

TEST(MemoryModeTest, WrongModesNameFieldValueAndLimit) {
  const std::unique_ptr<Engine> engine = Start(Options(LoadGolden("A").checkpoint));
  const auto error = [&](const MemoryMode& mode) {
    GenerateRequest request = Request(LoadGolden("A"), mode);
    return std::string(Generate(*engine, request).finished.status().message());
  };
  const std::string knn = std::to_string(engine->model().mem_knn);
  EXPECT_EQ(error({.knn = 0}), "memory.knn: 0 is not in [1, " + knn + "]");
  EXPECT_EQ(error({.knn = 1000}), "memory.knn: 1000 is not in [1, " + knn + "]");
  EXPECT_EQ(error({.layers = {4, 2}}), "memory.layers: layer 2 has no memory; these do: 1, 4");
  EXPECT_EQ(error({.layers = {-1}}), "memory.layers: layer -1 has no memory; these do: 1, 4");
  EXPECT_EQ(error({.layers = {1, 4, 1}}), "memory.layers: has 3 entries; the model has 2 memory layers: 1, 4");
  EXPECT_EQ(error({.masked_rows = {0, 1024}}), "memory.masked_rows: row 1024 at index 1 is not in [0, 1024)");
  EXPECT_EQ(error({.masked_rows = {-1}}), "memory.masked_rows: row -1 at index 0 is not in [0, 1024)");
  EXPECT_EQ(error({.masked_rows = std::vector<int32_t>(1025, 3)}), "memory.masked_rows: has 1025 rows; at most 1024 are accepted");
  ScoreRequest score;
  score.context = std::vector<int32_t>{1};
  score.continuations = {std::vector<int32_t>{2}};
  score.memory.knn = -3;
  EXPECT_EQ(Score(*engine, score).status().message(), "memory.knn: -3 is not in [1, " + knn + "]");

  const std::unique_ptr<Engine> dense = Start(Options(LoadGolden("E").checkpoint));
  GenerateRequest request = Request(LoadGolden("E"), {.enabled = false});
  EXPECT_TRUE(Generate(*dense, request).finished.ok());
  request.memory = {.layers = {1}};
  EXPECT_EQ(Generate(*dense, request).finished.status().message(), "memory.layers: the model has no memory layers");
}

}  // namespace
}  // namespace memserve::engine
