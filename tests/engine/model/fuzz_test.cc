// Mutations of good files through the parsers, and mutated checkpoints through a whole start: an engine or one line, never a crash.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>
#include <random>

#include "engine/engine.h"
#include "tests/fuzz/mutate.h"
#include "tests/fuzz/targets.h"
#include "tests/support/collector.h"
#include "tests/support/files.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using testing::ReadWholeFile;
using testing::TempFolder;
using testing::WriteFile;

std::string Golden(const std::string& path) { return std::string(MEMSERVE_GOLDEN_DIR) + "/" + path; }

std::string HeaderOf(const std::string& path) {
  const std::string file = ReadWholeFile(path);
  uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof(length));
  return file.substr(8, length);
}

void FeedMutations(const std::vector<std::string>& seeds, const std::function<void(const std::string&)>& target) {
  std::mt19937 random(3);
  for (const std::string& seed : seeds) {
    target(seed);
    for (int i = 0; i < 2000; ++i) target(fuzz::Mutate(seed, random));
  }
}

TEST(FuzzTest, SafetensorsHeaders) {
  FeedMutations({R"({"__metadata__":{"a":"b"},"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]},"b":{"dtype":"I8","shape":[4,24],"data_offsets":[4000,4096]}})",
                 HeaderOf(Golden("E/checkpoint/model.safetensors"))},
                fuzz::SafetensorsHeader);
}

TEST(FuzzTest, SafetensorsIndexes) {
  FeedMutations({ReadWholeFile(Golden("hf/llama_llama3/checkpoint/model.safetensors.index.json"))}, fuzz::SafetensorsIndex);
}

TEST(FuzzTest, ModelConfigs) {
  std::vector<std::string> seeds = {ReadWholeFile(Golden("A/checkpoint/config.json")), ReadWholeFile(Golden("D/checkpoint/config.json"))};
  for (const std::string& name : testing::HuggingFaceNames()) seeds.push_back(ReadWholeFile(Golden("hf/" + name + "/checkpoint/config.json")));
  FeedMutations(seeds, fuzz::ModelConfig);
}

TEST(FuzzTest, GenerationConfigs) {
  FeedMutations({R"({"max_new_tokens": 9, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "eos_token_id": [2, 7], "bos_token_id": 1})"},
                fuzz::GenerationConfig);
}

// Changes a file of a checkpoint, starts an engine on it, and lets it generate if it starts.
void StartMutated(int first, int count) {
  const std::vector<std::string> cases = {"F", "B", "D", "hf/llama_llama3", "hf/llama_bias_f16", "hf/qwen3_yarn"};
  int refused = 0;
  for (int round = first; round < first + count; ++round) {
    std::mt19937 random(round);
    const TempFolder folder;
    std::filesystem::copy(Golden(cases[round % cases.size()] + "/checkpoint"), folder.path(),
                          std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing);
    std::vector<std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder.path())) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    const std::string path = files[random() % files.size()];
    // Headers are where parsers are; one in eight goes anywhere in the file.
    const bool tensors = path.ends_with(".safetensors") && random() % 8 != 0;
    WriteFile(path, fuzz::Mutate(ReadWholeFile(path), random, tensors ? 3000 : std::string::npos));
    EngineOptions options;
    options.checkpoint = folder.path();
    options.memory_limit_bytes = 1 << 28;
    options.threads = 1;
    const absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(options);
    if (!engine.ok()) {
      ++refused;
      EXPECT_FALSE(engine.status().message().empty());
      EXPECT_EQ(engine.status().message().find('\n'), std::string::npos) << engine.status();
      continue;
    }
    GenerateRequest request;
    request.prompt = std::vector<int32_t>{1, 2, 3, 4, 5};
    request.stop.max_tokens = 3;
    testing::Generate(**engine, request);  // whatever it says
  }
  EXPECT_GT(refused, count / 3);
  EXPECT_LT(refused, count);
}

TEST(FuzzTest, AHundredMutatedCheckpointsNeverCrash) { StartMutated(0, 100); }
TEST(FuzzLongTest, AThousandMutatedCheckpointsNeverCrash) { StartMutated(1000, 1000); }

}  // namespace
}  // namespace memserve::engine
