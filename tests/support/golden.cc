#include "tests/support/golden.h"

#include <fstream>
#include <sstream>

#include "engine/model/json.h"
#include "engine/start_plan.h"
#include "kernels/check.h"

namespace memserve::testing {
namespace {

template <typename T>
std::vector<T> ReadArray(const engine::Checkpoint& arrays, const std::string& name) {
  const engine::TensorInfo* tensor = arrays.Find(name);
  if (tensor == nullptr) {
    std::fprintf(stderr, "no array %s\n", name.c_str());
    std::abort();
  }
  std::vector<T> values(tensor->bytes / sizeof(T));
  MEMSERVE_CHECK(arrays.Read(*tensor, 0, tensor->bytes, values.data()).ok());
  return values;
}

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  MEMSERVE_CHECK(file.good());
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

}  // namespace

std::vector<std::string> GoldenNames() { return {"A", "B", "D", "E", "F", "H"}; }

std::vector<std::string> HuggingFaceNames() {
  return {"llama", "llama_linear", "llama_llama3", "llama_yarn", "llama_bias_f16", "mistral", "qwen2", "qwen3", "qwen3_yarn"};
}

GoldenCase LoadGolden(const std::string& name) {
  GoldenCase golden;
  const std::string folder = std::string(MEMSERVE_GOLDEN_DIR) + "/" + name;
  golden.name = name;
  golden.checkpoint = folder + "/checkpoint";
  const nlohmann::json expected = nlohmann::json::parse(ReadAll(folder + "/expected.json"));
  if (expected.contains("memory_layers")) golden.memory_layers = expected.at("memory_layers").get<std::vector<int>>();
  for (const nlohmann::json& sequence : expected.at("sequences")) {
    GoldenSequence& read = golden.sequences.emplace_back();
    read.name = sequence.at("name");
    if (const auto text = sequence.find("text"); text != sequence.end() && text->is_string()) read.text = text->get<std::string>();
    read.tokens = sequence.at("tokens").get<std::vector<int32_t>>();
    if (sequence.contains("loglikelihood")) read.loglikelihood = sequence.at("loglikelihood").get<std::vector<double>>();
    if (sequence.contains("greedy_tokens")) read.greedy_tokens = sequence.at("greedy_tokens").get<std::vector<int32_t>>();
  }
  golden.arrays = engine::Checkpoint::Open(folder).value();
  return golden;
}

std::vector<float> GoldenCase::Floats(const std::string& array) const { return ReadArray<float>(*arrays, array); }
std::vector<int32_t> GoldenCase::Ints(const std::string& array) const { return ReadArray<int32_t>(*arrays, array); }

engine::EngineOptions ParityOptions(const std::string& checkpoint) {
  engine::EngineOptions options;
  options.checkpoint = checkpoint;
  options.activation_dtype = "f32";
  options.threads = 2;
  return options;
}

std::unique_ptr<LoadedModel> LoadModel(const engine::EngineOptions& options) {
  auto model = std::make_unique<LoadedModel>();
  const std::string config = options.checkpoint + "/config.json";
  model->config = engine::ParseModelConfig(ReadAll(config), config).value();
  const std::unique_ptr<engine::Checkpoint> checkpoint = engine::Checkpoint::Open(options.checkpoint).value();
  const engine::StartPlan plan = engine::MakeStartPlan(options, model->config, *checkpoint).value();
  model->executor = engine::Executor::Load(model->config, *checkpoint, plan.executor).value();
  return model;
}

engine::Batch PrefillBatch(const LoadedModel& model, const std::vector<std::vector<int32_t>>& sequences, int64_t page_size) {
  engine::Batch batch;
  for (const std::vector<int32_t>& tokens : sequences) {
    batch.pages_per_sequence =
        std::max<int64_t>(batch.pages_per_sequence, (static_cast<int64_t>(tokens.size()) + page_size - 1) / page_size);
  }
  int32_t next_page = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    batch.memory_knn.push_back(model.config.memory.mem_knn);
    const int64_t pages = (static_cast<int64_t>(sequences[s].size()) + page_size - 1) / page_size;
    for (int64_t p = 0; p < batch.pages_per_sequence; ++p)
      batch.block_tables.push_back(p < pages ? next_page + static_cast<int32_t>(p) : -1);
    for (size_t t = 0; t < sequences[s].size(); ++t) {
      batch.token_ids.push_back(sequences[s][t]);
      batch.from_slot.push_back(-1);
      batch.positions.push_back(static_cast<int32_t>(t));
      batch.sequence.push_back(static_cast<int32_t>(s));
      batch.kv_slots.push_back((next_page + static_cast<int64_t>(t) / page_size) * page_size + static_cast<int64_t>(t) % page_size);
      batch.logit_tokens.push_back(static_cast<int32_t>(batch.token_ids.size() - 1));
      batch.score_targets.push_back(-1);
    }
    next_page += static_cast<int32_t>(pages);
  }
  return batch;
}

}  // namespace memserve::testing
