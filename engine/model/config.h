// The constants of a model, from config.json. With model_type "memory_llama" that spells the original memory-layer implementation's
// names, one level deep, with `productkey_args` inside; with "llama", "mistral", "qwen2" or "qwen3" it is Hugging Face's, and the
// model a dense trunk. Everything is checked and bounded here, so the rest of the engine may trust it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/rope_scaling.h"
#include "engine/model/tensor_names.h"
#include "kernels/rope.h"

namespace memserve::engine {

// Product-key memory layers (arXiv 2412.09764). `layers` is empty for a dense model.
struct MemoryConfig {
  std::vector<int> layers;    // ascending
  int64_t mem_n_keys = 1024;  // half keys per half
  int mem_heads = 4;
  int mem_knn = 32;
  int mem_k_dim = 512;  // of a query; half_dim is half of it
  int mem_v_dim = -1;   // <= 0: dim
  bool mem_share_values = true;
  bool swilu_projection = true;  // Memory+
  bool mem_gated = false;
  bool peer_variant = false;
  enum class QueryNorm { kNone, kLayerNorm, kRmsNorm };
  QueryNorm query_norm = QueryNorm::kNone;
  bool query_norm_over_half = false;  // each half of a head's query by itself
  double query_norm_eps = 1e-5;

  int half_dim() const { return mem_k_dim / 2; }
  int query_norm_dim() const { return query_norm_over_half ? half_dim() : mem_k_dim; }
  int64_t rows() const { return mem_n_keys * mem_n_keys; }
};

struct ModelConfig {
  std::string model_type;  // "memory_llama", "llama", "mistral", "qwen2", "qwen3"
  TensorNames names;       // how the checkpoint spells the tensors
  int dim = 0;
  int n_layers = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int ffn_dim = 0;
  double norm_eps = 1e-5;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  int max_seqlen = 0;
  int vocab_size = 0;
  bool weight_tying = false;
  bool qk_norm = false;  // RMSNorm over each head of q and k, before rotary
  bool qkv_bias = false;
  bool output_bias = false;  // of the attention's last product
  bool mlp_bias = false;
  std::vector<int> sliding_window;  // [n_layers]; 0: none
  kernels::RopePairing rope_pairing = kernels::RopePairing::kInterleaved;
  MemoryConfig memory;
  std::string tokenizer;  // "sentencepiece", "bytes", "bpe", "tiktoken", "none"; empty: by the files in the folder
  // Hugging Face's config.json may name them; generation_config.json goes first.
  std::vector<int32_t> eos_token_ids;
  std::optional<int32_t> bos_token_id;

  bool IsMemoryLayer(int layer) const;
  // Width of a value row: mem_v_dim, or dim. PEER rows are always dim wide.
  int value_dim() const;
  // Whether pooled rows pass a projection back to dim.
  bool has_value_projection() const { return !memory.peer_variant && (memory.swilu_projection || memory.mem_v_dim > 0); }
};

// Sampling defaults that a checkpoint brings along (generation_config.json).
struct GenerationConfig {
  std::optional<int> max_new_tokens;
  std::optional<float> temperature;
  std::optional<int> top_k;
  std::optional<float> top_p;
  std::vector<int32_t> eos_token_ids;
  std::optional<int32_t> bos_token_id;
};

// `where` names the file in messages. INVALID_ARGUMENT names key, value and limit.
absl::StatusOr<ModelConfig> ParseModelConfig(const std::string& json, const std::string& where);
absl::StatusOr<GenerationConfig> ParseGenerationConfig(const std::string& json, const std::string& where);

}  // namespace memserve::engine
