// The reference cases in tests/golden: a checkpoint each, and what the original implementation or transformers computes for it.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/batch.h"
#include "engine/executor.h"
#include "engine/model/checkpoint.h"
#include "engine/model/config.h"
#include "engine/options.h"

namespace memserve::testing {

struct GoldenSequence {
  std::string name;
  std::optional<std::string> text;     // that the tokens were encoded from, after one that begins the sequence
  std::vector<int32_t> tokens;
  std::vector<double> loglikelihood;   // [i]: of tokens[i + 1]
  std::vector<int32_t> greedy_tokens;  // 64, not stopped at the end of sequence; some cases have none
};

struct GoldenCase {
  std::string name;
  std::string checkpoint;  // folder
  std::vector<int> memory_layers;
  std::vector<GoldenSequence> sequences;
  std::unique_ptr<engine::Checkpoint> arrays;  // expected.safetensors

  std::vector<float> Floats(const std::string& array) const;
  std::vector<int32_t> Ints(const std::string& array) const;
};

// All cases: A, B, D, E, F, H.
std::vector<std::string> GoldenNames();
// Folders of Hugging Face models, below golden/hf.
std::vector<std::string> HuggingFaceNames();
// A case by its folder below golden: "A", "hf/llama".
GoldenCase LoadGolden(const std::string& name);

// A checkpoint with its config and an executor on it, in parity mode (float32 activations) unless options say otherwise.
struct LoadedModel {
  engine::ModelConfig config;
  std::unique_ptr<engine::Executor> executor;
};
engine::EngineOptions ParityOptions(const std::string& checkpoint);
std::unique_ptr<LoadedModel> LoadModel(const engine::EngineOptions& options);

// A batch that runs whole sequences, each on pages of its own from `first_page` on, and wants logits everywhere.
engine::Batch PrefillBatch(const LoadedModel& model, const std::vector<std::vector<int32_t>>& sequences, int64_t page_size = 16);

}  // namespace memserve::testing
