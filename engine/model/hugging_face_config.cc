#include "engine/model/hugging_face_config.h"

#include <algorithm>
#include <climits>

#include "engine/model/config_reader.h"

namespace memserve::engine {
namespace {

using nlohmann::json;

// What transformers assumes where config.json is silent.
struct Family {
  const char* model_type;
  int n_kv_heads;  // 0: as many as query heads
  int head_dim;    // 0: dim / n_heads
  int max_positions;
  bool qkv_bias;        // always there
  bool attention_bias;  // there if config.json's attention_bias says so, on all four products
  bool mlp_bias;        // there if config.json's mlp_bias says so
  bool qk_norm;
  enum class Window { kNone, kAllLayers, kByLayer } window;
};

constexpr Family kFamilies[] = {
    {"llama", 0, 0, 2048, false, true, true, false, Family::Window::kNone},
    {"mistral", 8, 0, 131072, false, false, false, false, Family::Window::kAllLayers},
    {"qwen2", 32, 0, 32768, true, false, false, false, Family::Window::kByLayer},
    {"qwen3", 32, 128, 32768, false, true, false, true, Family::Window::kByLayer},
};

const Family* FamilyOf(const std::string& model_type) {
  const auto* found =
      std::find_if(std::begin(kFamilies), std::end(kFamilies), [&](const Family& f) { return model_type == f.model_type; });
  return found == std::end(kFamilies) ? nullptr : found;
}

// Keys under which a model would be another one than we compute.
void RefuseWhatWeDoNotCompute(ConfigReader& reader) {
  const std::string activation = reader.String("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    reader.Fail(absl::StrCat("hidden_act is '", activation.substr(0, 40), "'; only silu is supported"));
  }
  if (reader.Find("quantization_config") != nullptr) {
    reader.Fail(
        "has a quantization_config: its weights are packed in a way that is not read here; take the unquantised checkpoint");
  }
  if (reader.Number("partial_rotary_factor", 0, 1, 1.0) != 1)
    reader.Fail("partial_rotary_factor is not 1: only whole heads are turned here");
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts"}) {
    if (reader.Int(key, 0, INT_MAX, 0) > 0) reader.Fail(absl::StrCat(key, " is set: mixtures of experts are not supported"));
  }
}

// The rotary scaling's object: transformers 5 calls it rope_parameters, earlier ones rope_scaling.
void ReadRope(ConfigReader& reader, ModelConfig& config) {
  const char* key = reader.Find("rope_scaling") != nullptr ? "rope_scaling" : "rope_parameters";
  const json* object = reader.Object(key);
  config.rope_theta = reader.Number("rope_theta", 1.0, 1e12, 10000.0);
  if (object == nullptr) return;
  const std::string where = absl::StrCat(reader.where(), ": ", key);
  ConfigReader inner(*object, where);
  config.rope_theta = inner.Number("rope_theta", 1.0, 1e12, config.rope_theta);
  if (!inner.status().ok()) return reader.Fail(inner.status());
  json with_original = *object;
  if (const json* original = reader.Find("original_max_position_embeddings"); original != nullptr) {
    with_original["original_max_position_embeddings"] = *original;
  }
  absl::StatusOr<RopeScaling> scaling = ParseRopeScaling(with_original, where, config.max_seqlen);
  if (!scaling.ok()) return reader.Fail(scaling.status());
  config.rope_scaling = *scaling;
  if (scaling->type == RopeScaling::Type::kYarn) {
    // Such files often keep the context before scaling in max_position_embeddings.
    const double reach = std::min<double>(kMaxPositions, scaling->factor * scaling->original_positions);
    config.max_seqlen = std::max(config.max_seqlen, static_cast<int>(reach));
  }
}

void ReadWindows(const Family& family, ConfigReader& reader, ModelConfig& config) {
  config.sliding_window.assign(config.n_layers, 0);
  if (family.window == Family::Window::kNone) return;
  // An absent key has the default, null says that there is none.
  const bool none = reader.Has("sliding_window") && reader.Find("sliding_window") == nullptr;
  int window = none ? 0 : static_cast<int>(reader.Int("sliding_window", 0, kMaxPositions, 4096));
  if (family.window == Family::Window::kAllLayers) {
    config.sliding_window.assign(config.n_layers, window);
    return;
  }
  if (!reader.Bool("use_sliding_window", false)) window = 0;
  const json* types = reader.Find("layer_types");
  if (types == nullptr) {
    const int64_t first = reader.Int("max_window_layers", 0, INT_MAX, 28);
    for (int64_t layer = first; layer < config.n_layers; ++layer) config.sliding_window[layer] = window;
    return;
  }
  if (!types->is_array() || static_cast<int>(types->size()) != config.n_layers) {
    return reader.Fail(absl::StrCat("layer_types must be a list of num_hidden_layers, ", config.n_layers, ", names"));
  }
  for (int layer = 0; layer < config.n_layers; ++layer) {
    const json& type = (*types)[layer];
    if (type == "sliding_attention") {
      if (window == 0)
        return reader.Fail(absl::StrCat("layer_types gives layer ", layer,
                                        " a sliding window, but there is none (sliding_window, use_sliding_window)"));
      config.sliding_window[layer] = window;
    } else if (type != "full_attention") {
      return reader.Fail(absl::StrCat("layer_types has ", type.dump(-1, ' ', true).substr(0, 60), " for layer ", layer,
                                      "; known are full_attention, sliding_attention"));
    }
  }
}

}  // namespace

bool IsHuggingFaceType(const std::string& model_type) { return FamilyOf(model_type) != nullptr; }

absl::StatusOr<ModelConfig> ParseHuggingFaceConfig(const json& document, const std::string& where) {
  ConfigReader reader(document, where);
  ModelConfig config;
  config.model_type = reader.String("model_type", "");
  const Family* family = FamilyOf(config.model_type);
  MEMSERVE_CHECK(family != nullptr);
  config.names = TensorNames(TensorNames::Style::kHuggingFace);
  config.rope_pairing = kernels::RopePairing::kHalves;
  RefuseWhatWeDoNotCompute(reader);
  config.dim = static_cast<int>(reader.Int("hidden_size", 1, kMaxDim, std::nullopt));
  config.n_layers = static_cast<int>(reader.Int("num_hidden_layers", 1, kMaxLayers, std::nullopt));
  config.n_heads = static_cast<int>(reader.Int("num_attention_heads", 1, kMaxHeads, std::nullopt));
  config.ffn_dim = static_cast<int>(reader.Int("intermediate_size", 1, kMaxFfnDim, std::nullopt));
  config.vocab_size = static_cast<int>(reader.Int("vocab_size", 1, kMaxVocabulary, std::nullopt));
  config.max_seqlen = static_cast<int>(reader.Int("max_position_embeddings", 1, kMaxPositions, family->max_positions));
  if (!reader.status().ok()) return reader.status();

  const bool says_kv_heads = family->n_kv_heads > 0 && !reader.Has("num_key_value_heads");
  config.n_kv_heads =
      static_cast<int>(reader.Int("num_key_value_heads", 1, kMaxHeads, says_kv_heads ? family->n_kv_heads : config.n_heads));
  config.head_dim = static_cast<int>(
      reader.Int("head_dim", 2, kMaxHeadDim, family->head_dim > 0 ? family->head_dim : std::max(2, config.dim / config.n_heads)));
  config.norm_eps = reader.Number("rms_norm_eps", 0.0, 1.0, 1e-6);
  config.weight_tying = reader.Bool("tie_word_embeddings", false);
  const bool attention_bias = reader.Bool("attention_bias", false);
  const bool mlp_bias = reader.Bool("mlp_bias", false);
  if (attention_bias && !family->attention_bias && !family->qkv_bias)
    reader.Fail("attention_bias is true; models of this type have none");
  if (mlp_bias && !family->mlp_bias) reader.Fail("mlp_bias is true; models of this type have none");
  config.output_bias = family->attention_bias && attention_bias;
  config.qkv_bias = family->qkv_bias || config.output_bias;
  config.mlp_bias = mlp_bias;
  config.qk_norm = family->qk_norm;
  ReadRope(reader, config);
  if (reader.status().ok()) ReadWindows(*family, reader, config);
  config.tokenizer = reader.String("tokenizer", "");
  if (!reader.status().ok()) return reader.status();
  absl::StatusOr<SpecialTokens> special = ReadSpecialTokens(reader);
  if (!special.ok()) return special.status();
  config.eos_token_ids = std::move(special->eos);
  config.bos_token_id = special->bos;
  return config;
}

}  // namespace memserve::engine
