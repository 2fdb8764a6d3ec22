// Hugging Face folders: the logits and greedy tokens that transformers computes for them.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "engine/engine.h"
#include "tests/support/collector.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using testing::GoldenCase;
using testing::GoldenSequence;
using testing::LoadedModel;
using testing::LoadGolden;

struct Setting {
  std::string name;
  std::string backend;
  int ranks;
};

void PrintTo(const Setting& setting, std::ostream* out) { *out << setting.name << " " << setting.backend << " " << setting.ranks; }

EngineOptions Options(const Setting& setting, const GoldenCase& golden) {
  EngineOptions options = testing::ParityOptions(golden.checkpoint);
  options.backend = setting.backend;
  options.devices.clear();
  for (int r = 0; r < setting.ranks; ++r) options.devices.push_back(r);
  return options;
}

class HuggingFaceTest : public ::testing::TestWithParam<Setting> {};

TEST_P(HuggingFaceTest, LogitsAndGreedyTokensAreThoseOfTransformers) {
  const GoldenCase golden = LoadGolden("hf/" + GetParam().name);
  const std::unique_ptr<LoadedModel> model = testing::LoadModel(Options(GetParam(), golden));
  const int64_t vocab = model->config.vocab_size;
  for (const GoldenSequence& sequence : golden.sequences) {
    std::vector<int32_t> tokens = sequence.tokens;
    tokens.insert(tokens.end(), sequence.greedy_tokens.begin(), sequence.greedy_tokens.end());
    const std::vector<float> logits = model->executor->ExecuteForLogits(testing::PrefillBatch(*model, {tokens})).value();
    // The file has those of the last positions of the prompt.
    const std::vector<float> expected = golden.Floats(sequence.name + ".logits");
    const int64_t prompt = static_cast<int64_t>(sequence.tokens.size()),
                  first = prompt - static_cast<int64_t>(expected.size()) / vocab;
    double worst = 0;
    for (size_t i = 0; i < expected.size(); ++i)
      worst = std::max(worst, std::abs(double{logits[first * vocab + i]} - double{expected[i]}));
    EXPECT_LT(worst, 1e-4) << sequence.name;
    std::vector<int32_t> greedy;
    for (int64_t t = prompt - 1; t + 1 < static_cast<int64_t>(tokens.size()); ++t) {
      const float* row = &logits[t * vocab];
      greedy.push_back(static_cast<int32_t>(std::max_element(row, row + vocab) - row));
    }
    EXPECT_EQ(greedy, sequence.greedy_tokens) << sequence.name;
  }
}

TEST_P(HuggingFaceTest, GeneratesWhatTransformersGenerates) {
  const GoldenCase golden = LoadGolden("hf/" + GetParam().name);
  EngineOptions options = Options(GetParam(), golden);
  options.max_batch_tokens = 48;  // prompts in chunks
  const std::unique_ptr<Engine> engine = Engine::Create(options).value();
  EXPECT_THAT(golden.checkpoint, ::testing::HasSubstr(engine->model().architecture));
  EXPECT_THAT(engine->model().eos_token_ids, ::testing::ElementsAre(2));  // config.json's: there is no generation_config.json
  EXPECT_EQ(engine->model().bos_token_id, 1);
  std::vector<GenerateRequest> requests;
  for (const GoldenSequence& sequence : golden.sequences) {
    GenerateRequest& request = requests.emplace_back();
    request.prompt = sequence.tokens;
    request.sampling.temperature = 0;
    request.stop.max_tokens = static_cast<int>(sequence.greedy_tokens.size());
    request.stop.ignore_eos = true;
  }
  const std::vector<testing::Generated> generated = testing::GenerateAll(*engine, requests);
  for (size_t i = 0; i < generated.size(); ++i) {
    EXPECT_EQ(generated[i].token_ids, golden.sequences[i].greedy_tokens) << golden.sequences[i].name;
  }
}

std::vector<Setting> Settings() {
  std::vector<Setting> settings;
  for (const std::string& name : testing::HuggingFaceNames()) {
    settings.push_back({name, "reference", 1});
    for (int ranks : {1, 2, 3}) settings.push_back({name, "cpu", ranks});
  }
  return settings;
}

INSTANTIATE_TEST_SUITE_P(Cases, HuggingFaceTest, ::testing::ValuesIn(Settings()), [](const auto& info) {
  return info.param.name + "_" + info.param.backend + "_" + std::to_string(info.param.ranks) + "ranks";
});

}  // namespace
}  // namespace memserve::engine
