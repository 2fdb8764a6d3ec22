// A product-key memory layer (Memory Layers at Scale, arXiv 2412.09764; PEER, arXiv 2407.04153). With input x [dim], per token:
//
//   query               = norm(W_q x + b_q)                                   [mem_heads, 2, half_dim]
//                         norm: none, LayerNorm or RMSNorm, over each head's query or each half of it
//   rows, weights       = product_key_search(query, half_keys)             [mem_heads, knn], without the rows that are masked
//   pooled              = Σ over heads and knn of weights · value_table[rows]
//   plain:    out       = pooled, or W_v pooled + b_v where rows are not dim wide
//   Memory+:  out       = W_v (silu(W_s x + b_s) ⊙ pooled) + b_v
//   PEER:     out       = Σ gelu(u[row] · x) · weight · v[row]
//   gated:    out       = sigmoid(W_g x + b_g) · out
//
// Ranks hold columns of the value table. Collectives: Memory+ one all-reduce after W_v; plain one all-gather of columns; PEER one
// all-reduce of the products u · x and one all-gather.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine/model/shard.h"
#include "engine/model/value_table.h"
#include "engine/model/workspace.h"

namespace memserve::engine {

// Activations that all memory layers take turns with.
struct MemoryScratch {
  MemoryScratch(const ModelConfig& config, const Shard& shard, kernels::DType table, int64_t max_tokens, Workspace& workspace);
  float* query;    // [max_tokens, mem_heads, 2, half_dim]
  float* scores;   // [max_tokens, mem_heads, knn]
  float* weights;  // [max_tokens, mem_heads, knn]
  int32_t* rows;   // [max_tokens, mem_heads, knn]
  float* dots;     // PEER: [max_tokens, mem_heads, knn]
  float* pooled;   // [max_tokens, columns of this rank]
  float* gate;     // Memory+: [max_tokens, columns of this rank]; gated: [max_tokens, 1]
};

class MemoryLayer {
 public:
  // `table` is read by this layer and outlives it.
  static absl::StatusOr<std::unique_ptr<MemoryLayer>> Load(const ModelConfig& config, const Shard& shard, int layer,
                                                           const ValueTable& table, WeightLoader& loader);

  // x, out: [num_tokens, dim]; out is complete. For tokens with a knn of 0 here it is meaningless: the caller must not add it.
  // An error only for what a row store can get wrong (a disk that fails).
  absl::Status Forward(const ForwardContext& context, const MemoryScratch& scratch, kernels::TensorView<const float, 2> x,
                       kernels::TensorView<float, 2> out) const;

  int place() const { return place_; }  // among the memory layers

 private:
  void Search(const ForwardContext& context, const MemoryScratch& scratch, kernels::TensorView<const float, 2> x) const;
  void NormaliseQuery(const ForwardContext& context, kernels::TensorView<float, 2> query) const;
  void Trace(const ForwardContext& context, const MemoryScratch& scratch) const;
  void ScaleByExperts(const ForwardContext& context, const MemoryScratch& scratch, kernels::TensorView<const float, 2> x) const;

  const ModelConfig* config_ = nullptr;
  int place_ = 0;
  const ValueTable* table_ = nullptr;
  bool first_rank_ = true;  // adds the bias of a product whose inputs are split
  Matrix query_, half_keys_, value_projection_, swilu_, gating_;
  Vector query_norm_, query_norm_bias_;
  Vector query_bias_, value_bias_, swilu_bias_, gating_bias_;
};

}  // namespace memserve::engine
