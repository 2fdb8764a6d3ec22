#include "engine/model/config.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/model/config_reader.h"
#include "engine/model/hugging_face_config.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {
namespace {

using nlohmann::json;

constexpr int64_t kMaxKeys = 46340;  // rows fit int32

// "1,4" → {1, 4}
std::vector<int> ParseLayers(const std::string& text, int n_layers, ConfigReader& reader) {
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

void ReadQueryNorm(ConfigReader& reader, MemoryConfig& memory) {
  const std::string norm = reader.String("query_norm", "");
  const std::string over = reader.String("query_norm_over", "head");
  memory.query_norm_eps = reader.Number("query_norm_eps", 0.0, 1.0, 1e-5);
  memory.query_norm_over_half = over == "half";
  if (over != "head" && over != "half") {
    reader.Fail(absl::StrCat("query_norm_over is '", over.substr(0, 40), "'; it must be head or half"));
  }
  if (norm == "layer_norm") {
    memory.query_norm = MemoryConfig::QueryNorm::kLayerNorm;
  } else if (norm == "rms_norm") {
    memory.query_norm = MemoryConfig::QueryNorm::kRmsNorm;
  } else if (!norm.empty()) {
    reader.Fail(absl::StrCat("query_norm is '", norm.substr(0, 40), "'; it must be layer_norm or rms_norm"));
  }
}

absl::StatusOr<MemoryConfig> ParseMemory(const json& object, const ModelConfig& model, const std::string& where) {
  ConfigReader reader(object, absl::StrCat(where, ": productkey_args"));
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
  ReadQueryNorm(reader, memory);
  if (memory.mem_knn > memory.mem_n_keys) {
    reader.Fail(absl::StrCat("mem_knn is ", memory.mem_knn, "; there are only ", memory.mem_n_keys, " half keys (mem_n_keys)"));
  }
  if (memory.mem_k_dim % 2 != 0) reader.Fail(absl::StrCat("mem_k_dim is ", memory.mem_k_dim, "; it must be even"));
  if (!reader.status().ok()) return reader.status();
  return memory;
}

}  // namespace

bool ModelConfig::IsMemoryLayer(int layer) const { return std::binary_search(memory.layers.begin(), memory.layers.end(), layer); }

int ModelConfig::value_dim() const { return memory.mem_v_dim > 0 && !memory.peer_variant ? memory.mem_v_dim : dim; }

namespace {

absl::StatusOr<ModelConfig> ParseMemoryLlama(const json& document, const std::string& where) {
  ConfigReader reader(document, where);
  ModelConfig config;
  config.model_type = "memory_llama";
  config.dim = static_cast<int>(reader.Int("dim", 1, kMaxDim, std::nullopt));
  config.n_layers = static_cast<int>(reader.Int("n_layers", 1, kMaxLayers, std::nullopt));
  config.n_heads = static_cast<int>(reader.Int("n_heads", 1, kMaxHeads, std::nullopt));
  config.vocab_size = static_cast<int>(reader.Int("vocab_size", 1, kMaxVocabulary, std::nullopt));
  config.max_seqlen = static_cast<int>(reader.Int("max_seqlen", 1, kMaxPositions, std::nullopt));
  if (!reader.status().ok()) return reader.status();
  config.n_kv_heads = static_cast<int>(reader.Int("n_kv_heads", 1, kMaxHeads, config.n_heads));
  config.head_dim = static_cast<int>(reader.Int("head_dim", 2, kMaxHeadDim, std::max(2, config.dim / config.n_heads)));
  config.norm_eps = reader.Number("norm_eps", 0.0, 1.0, 1e-5);
  config.rope_theta = reader.Number("rope_theta", 1.0, 1e12, 10000.0);
  config.weight_tying = reader.Bool("weight_tying", false);
  config.qk_norm = reader.Bool("qk_norm", false);
  config.qkv_bias = reader.Bool("attention_bias", false);
  config.sliding_window.assign(config.n_layers, static_cast<int>(reader.Int("sliding_window", 0, kMaxPositions, 0)));
  config.tokenizer = reader.String("tokenizer", "");
  const int64_t multiple_of = reader.Int("multiple_of", 1, kMaxDim, 256);
  const double multiplier = reader.Number("ffn_dim_multiplier", 1e-3, 1e3, 1.0);
  const int64_t own_ffn_dim = reader.Int("ffn_dim", 1, kMaxFfnDim, 0);
  if (!reader.status().ok()) return reader.status();
  const int64_t ffn_dim = own_ffn_dim > 0 ? own_ffn_dim : FeedForwardDim(config.dim, multiplier, multiple_of);
  if (ffn_dim < 1 || ffn_dim > kMaxFfnDim) reader.Fail(absl::StrCat("gives a feed-forward of width ", ffn_dim));
  config.ffn_dim = static_cast<int>(ffn_dim);
  if (const json* scaling = reader.Object("rope_scaling"); scaling != nullptr) {
    absl::StatusOr<RopeScaling> parsed = ParseRopeScaling(*scaling, absl::StrCat(where, ": rope_scaling"), config.max_seqlen);
    if (parsed.ok())
      config.rope_scaling = *parsed;
    else
      reader.Fail(parsed.status());
  }
  const json* memory = reader.Object("productkey_args");
  if (!reader.status().ok()) return reader.status();
  if (memory != nullptr) {
    LOAD_OR_RETURN(config.memory, ParseMemory(*memory, config, where));
  }
  return config;
}

// What no model may get wrong, whoever wrote the file.
absl::Status CheckModel(const ModelConfig& config, ConfigReader& reader) {
  const bool ours = config.model_type == "memory_llama";
  if (config.head_dim % 2 != 0) reader.Fail(absl::StrCat("head_dim is ", config.head_dim, "; rotary positions need an even one"));
  if (config.n_heads % config.n_kv_heads != 0) {
    reader.Fail(absl::StrCat(ours ? "n_kv_heads" : "num_key_value_heads", " is ", config.n_kv_heads, "; it must divide ",
                             ours ? "n_heads" : "num_attention_heads", ", ", config.n_heads));
  }
  if (config.rope_scaling.type == RopeScaling::Type::kYarn && config.rope_theta <= 1) {
    reader.Fail(absl::StrCat("rope_theta is ", config.rope_theta, "; yarn needs more than 1"));
  }
  constexpr const char* kTokenizers[] = {"", "sentencepiece", "bytes", "bpe", "tiktoken", "none"};
  if (std::find(std::begin(kTokenizers), std::end(kTokenizers), config.tokenizer) == std::end(kTokenizers)) {
    reader.Fail(
        absl::StrCat("tokenizer is '", config.tokenizer.substr(0, 100), "'; known are sentencepiece, bytes, bpe, tiktoken, none"));
  }
  return reader.status();
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(const std::string& text, const std::string& where) {
  LOAD_OR_RETURN(const json document, ParseJsonObject(text, where));
  ConfigReader reader(document, where);
  const std::string type = reader.String("model_type", "");
  if (!reader.status().ok()) return reader.status();
  ModelConfig config;
  if (type == "memory_llama") {
    LOAD_OR_RETURN(config, ParseMemoryLlama(document, where));
  } else if (IsHuggingFaceType(type)) {
    LOAD_OR_RETURN(config, ParseHuggingFaceConfig(document, where));
  } else {
    return absl::InvalidArgumentError(absl::StrCat(where, ": model_type is '", absl::Utf8SafeCHexEscape(type.substr(0, 100)),
                                                   "'; this server reads memory_llama, llama, mistral, qwen2, qwen3"));
  }
  if (absl::Status s = CheckModel(config, reader); !s.ok()) return s;
  return config;
}

absl::StatusOr<SpecialTokens> ReadSpecialTokens(ConfigReader& reader) {
  SpecialTokens tokens;
  if (reader.Find("bos_token_id") != nullptr) tokens.bos = static_cast<int32_t>(reader.Int("bos_token_id", 0, kMaxVocabulary, 0));
  const json* eos = reader.Find("eos_token_id");
  if (eos != nullptr && eos->is_array() && eos->size() <= 64) {
    for (const json& id : *eos) {
      if (!id.is_number_integer() || id < 0 || id > kMaxVocabulary)
        reader.Wrong<int>("eos_token_id", *eos, "an id or a list of ids");
      else
        tokens.eos.push_back(id.get<int32_t>());
    }
  } else if (eos != nullptr) {
    tokens.eos.push_back(static_cast<int32_t>(reader.Int("eos_token_id", 0, kMaxVocabulary, 0)));
  }
  if (!reader.status().ok()) return reader.status();
  return tokens;
}

absl::StatusOr<GenerationConfig> ParseGenerationConfig(const std::string& text, const std::string& where) {
  LOAD_OR_RETURN(const json document, ParseJsonObject(text, where));
  ConfigReader reader(document, where);
  GenerationConfig config;
  if (reader.Find("max_new_tokens") != nullptr)
    config.max_new_tokens = static_cast<int>(reader.Int("max_new_tokens", 1, 1 << 24, 1));
  if (reader.Find("temperature") != nullptr) config.temperature = static_cast<float>(reader.Number("temperature", 0, 100, 0.0));
  if (reader.Find("top_k") != nullptr) config.top_k = static_cast<int>(reader.Int("top_k", 0, INT32_MAX, 0));
  if (reader.Find("top_p") != nullptr) config.top_p = static_cast<float>(reader.Number("top_p", 1e-6, 1, 1.0));
  LOAD_OR_RETURN(SpecialTokens special, ReadSpecialTokens(reader));
  config.eos_token_ids = std::move(special.eos);
  config.bos_token_id = special.bos;
  return config;
}

}  // namespace memserve::engine
