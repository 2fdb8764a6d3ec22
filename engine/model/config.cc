#include "engine/model/config.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/model/json.h"

namespace memserve::engine {
namespace {

using nlohmann::json;

// Reads keys of one object; remembers the first thing that is wrong.
class Reader {
 public:
  Reader(const json& object, std::string where) : object_(object), where_(std::move(where)) {}

  // The integer under `key`, or `fallback` where it is absent or null. Out of [low, high] is an error.
  int64_t Int(const char* key, int64_t low, int64_t high, std::optional<int64_t> fallback) {
    const json* value = Find(key);
    if (value == nullptr) return fallback ? *fallback : Missing<int64_t>(key);
    if (!value->is_number_integer()) return Wrong<int64_t>(key, *value, "an integer");
    const bool fits = !value->is_number_unsigned() || value->get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
    if (!fits || value->get<int64_t>() < low || value->get<int64_t>() > high) {
      return Wrong<int64_t>(key, *value, absl::StrCat("in [", low, ", ", high, "]"));
    }
    return value->get<int64_t>();
  }

  double Number(const char* key, double low, double high, double fallback) {
    const json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number() || !(value->get<double>() >= low && value->get<double>() <= high)) {
      return Wrong<double>(key, *value, absl::StrCat("a number in [", low, ", ", high, "]"));
    }
    return value->get<double>();
  }

  bool Bool(const char* key, bool fallback) {
    const json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) return Wrong<bool>(key, *value, "true or false");
    return value->get<bool>();
  }

  std::string String(const char* key, const std::string& fallback) {
    const json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) return Wrong<std::string>(key, *value, "a string");
    return value->get<std::string>();
  }

  const json* Find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  template <typename T>
  T Wrong(const char* key, const json& value, const std::string& expected) {
    Fail(absl::StrCat(key, " is ", value.dump().substr(0, 100), "; it must be ", expected));
    return T();
  }

  void Fail(const std::string& message) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat(where_, ": ", message));
  }
  const absl::Status& status() const { return status_; }

 private:
  template <typename T>
  T Missing(const char* key) {
    Fail(absl::StrCat(key, " is missing"));
    return T();
  }

  const json& object_;
  const std::string where_;
  absl::Status status_;
};

constexpr int64_t kMaxDim = 1 << 20;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxKeys = 46340;  // rows fit int32

// "1,4" → {1, 4}
std::vector<int> ParseLayers(const std::string& text, int n_layers, Reader& reader) {
  std::vector<int> layers;
  for (const absl::string_view part : absl::StrSplit(text, ',', absl::SkipWhitespace())) {
    int layer = 0;
    if (!absl::SimpleAtoi(part, &layer) || layer < 0 || layer >= n_layers) {
      reader.Fail(absl::StrCat("productkey_args.layers has '", part.substr(0, 40), "'; the model has layers 0 to ", n_layers - 1));
      return {};
    }
    layers.push_back(layer);
  }
  std::sort(layers.begin(), layers.end());
  if (std::adjacent_find(layers.begin(), layers.end()) != layers.end()) {
    reader.Fail(absl::StrCat("productkey_args.layers is '", text.substr(0, 100), "'; it names a layer twice"));
  }
  return layers;
}

// The original implementation's width: both int() truncate.
int64_t FeedForwardDim(int64_t dim, double multiplier, int64_t multiple_of) {
  const int64_t hidden = static_cast<int64_t>(multiplier * static_cast<double>(2 * 4 * dim / 3));
  return multiple_of * ((hidden + multiple_of - 1) / multiple_of);
}

absl::StatusOr<MemoryConfig> ParseMemory(const json& object, const ModelConfig& model, const std::string& where) {
  Reader reader(object, absl::StrCat(where, ": productkey_args"));
  MemoryConfig memory;
  if (!reader.Bool("is_enabled", false)) return reader.status().ok() ? absl::StatusOr<MemoryConfig>(memory) : reader.status();
  memory.layers = ParseLayers(reader.String("layers", ""), model.n_layers, reader);
  memory.mem_n_keys = reader.Int("mem_n_keys", 1, kMaxKeys, 1024);
  memory.mem_heads = static_cast<int>(reader.Int("mem_heads", 1, 1024, 4));
  memory.mem_knn = static_cast<int>(reader.Int("mem_knn", 1, 1024, 32));
  memory.mem_k_dim = static_cast<int>(reader.Int("mem_k_dim", 2, kMaxDim, 512));
  memory.mem_v_dim = static_cast<int>(reader.Int("mem_v_dim", -1, kMaxDim, -1));
  memory.mem_share_values = reader.Bool("mem_share_values", true);
  memory.swilu_projection = reader.Bool("swilu_projection", true);
  memory.mem_gated = reader.Bool("mem_gated", false);
  memory.peer_variant = reader.Bool("peer_variant", false);
  if (memory.mem_knn > memory.mem_n_keys) {
    reader.Fail(absl::StrCat("mem_knn is ", memory.mem_knn, "; there are only ", memory.mem_n_keys, " half keys (mem_n_keys)"));
  }
  if (memory.mem_k_dim % 2 != 0) reader.Fail(absl::StrCat("mem_k_dim is ", memory.mem_k_dim, "; it must be even"));
  if (!reader.status().ok()) return reader.status();
  return memory;
}

}  // namespace

bool ModelConfig::IsMemoryLayer(int layer) const {
  return std::binary_search(memory.layers.begin(), memory.layers.end(), layer);
}

int ModelConfig::value_dim() const { return memory.mem_v_dim > 0 && !memory.peer_variant ? memory.mem_v_dim : dim; }

absl::StatusOr<ModelConfig> ParseModelConfig(const std::string& text, const std::string& where) {
  absl::StatusOr<json> document = ParseJsonObject(text, where);
  if (!document.ok()) return document.status();
  Reader reader(*document, where);
  const std::string type = reader.String("model_type", "");
  if (reader.status().ok() && type != "memory_llama") {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": model_type is '", type.substr(0, 100), "'; this server reads 'memory_llama'"));
  }
  ModelConfig config;
  config.dim = static_cast<int>(reader.Int("dim", 1, kMaxDim, std::nullopt));
  config.n_layers = static_cast<int>(reader.Int("n_layers", 1, kMaxLayers, std::nullopt));
  config.n_heads = static_cast<int>(reader.Int("n_heads", 1, 4096, std::nullopt));
  config.vocab_size = static_cast<int>(reader.Int("vocab_size", 1, 1 << 24, std::nullopt));
  config.max_seqlen = static_cast<int>(reader.Int("max_seqlen", 1, 1 << 24, std::nullopt));
  if (!reader.status().ok()) return reader.status();
  config.n_kv_heads = static_cast<int>(reader.Int("n_kv_heads", 1, 4096, config.n_heads));
  config.head_dim = static_cast<int>(reader.Int("head_dim", 2, 4096, std::max(2, config.dim / config.n_heads)));
  config.norm_eps = reader.Number("norm_eps", 0.0, 1.0, 1e-5);
  config.rope_theta = reader.Number("rope_theta", 1.0, 1e12, 10000.0);
  config.weight_tying = reader.Bool("weight_tying", false);
  config.sliding_window = static_cast<int>(reader.Int("sliding_window", 0, 1 << 24, 0));
  config.tokenizer = reader.String("tokenizer", "");
  const int64_t multiple_of = reader.Int("multiple_of", 1, kMaxDim, 256);
  const double multiplier = reader.Number("ffn_dim_multiplier", 1e-3, 1e3, 1.0);
  if (!reader.status().ok()) return reader.status();
  const int64_t ffn_dim = FeedForwardDim(config.dim, multiplier, multiple_of);
  if (ffn_dim < 1 || ffn_dim > 16 * kMaxDim) reader.Fail(absl::StrCat("gives a feed-forward of width ", ffn_dim));
  config.ffn_dim = static_cast<int>(ffn_dim);
  if (config.head_dim % 2 != 0) reader.Fail(absl::StrCat("head_dim is ", config.head_dim, "; rotary positions need an even one"));
  if (config.n_heads % config.n_kv_heads != 0) {
    reader.Fail(absl::StrCat("n_kv_heads is ", config.n_kv_heads, "; it must divide n_heads, ", config.n_heads));
  }
  if (!config.tokenizer.empty() && config.tokenizer != "sentencepiece" && config.tokenizer != "bytes" && config.tokenizer != "none" &&
      config.tokenizer != "bpe" && config.tokenizer != "tiktoken") {
    reader.Fail(absl::StrCat("tokenizer is '", config.tokenizer.substr(0, 100), "'; known are sentencepiece, bytes, bpe, tiktoken, none"));
  }
  if (!reader.status().ok()) return reader.status();
  if (const json* memory = reader.Find("productkey_args"); memory != nullptr) {
    if (!memory->is_object()) return absl::InvalidArgumentError(absl::StrCat(where, ": productkey_args is not an object"));
    absl::StatusOr<MemoryConfig> parsed = ParseMemory(*memory, config, where);
    if (!parsed.ok()) return parsed.status();
    config.memory = *std::move(parsed);
  }
  return config;
}

absl::StatusOr<GenerationConfig> ParseGenerationConfig(const std::string& text, const std::string& where) {
  absl::StatusOr<json> document = ParseJsonObject(text, where);
  if (!document.ok()) return document.status();
  Reader reader(*document, where);
  GenerationConfig config;
  if (reader.Find("max_new_tokens") != nullptr) config.max_new_tokens = static_cast<int>(reader.Int("max_new_tokens", 1, 1 << 24, 1));
  if (reader.Find("temperature") != nullptr) config.temperature = static_cast<float>(reader.Number("temperature", 0, 100, 0));
  if (reader.Find("top_k") != nullptr) config.top_k = static_cast<int>(reader.Int("top_k", 0, INT32_MAX, 0));
  if (reader.Find("top_p") != nullptr) config.top_p = static_cast<float>(reader.Number("top_p", 1e-6, 1, 1));
  if (reader.Find("bos_token_id") != nullptr) config.bos_token_id = static_cast<int32_t>(reader.Int("bos_token_id", 0, 1 << 24, 0));
  const json* eos = reader.Find("eos_token_id");
  if (eos != nullptr && eos->is_array() && eos->size() <= 64) {
    for (const json& id : *eos) {
      if (!id.is_number_integer() || id < 0 || id > (1 << 24)) reader.Wrong<int>("eos_token_id", *eos, "an id or a list of ids");
      else config.eos_token_ids.push_back(id.get<int32_t>());
    }
  } else if (eos != nullptr) {
    config.eos_token_ids.push_back(static_cast<int32_t>(reader.Int("eos_token_id", 0, 1 << 24, 0)));
  }
  if (!reader.status().ok()) return reader.status();
  return config;
}

}  // namespace memserve::engine
