// Grouped-query attention with rotary positions over the paged KV cache:
//   out = W_o · attention(rope(norm_q(W_q x + b_q)), rope(norm_k(W_k x + b_k)), W_v x + b_v) + b_o
// Biases and norms (RMSNorm over each head) only where the model has them.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine/model/shard.h"
#include "engine/model/workspace.h"
#include "kernels/attention.h"

namespace memserve::engine {

// cos and sin of position · frequency, computed in double (see rope_scaling.h). On the device, [positions, head_dim / 2] each.
struct RopeTables {
  kernels::TensorView<const float, 2> cos;
  kernels::TensorView<const float, 2> sin;
};
RopeTables MakeRopeTables(const ModelConfig& config, int64_t positions, kernels::Backend* backend, Workspace& workspace);

// Activations that all attention layers take turns with.
struct AttentionScratch {
  AttentionScratch(const ModelConfig& config, const Shard& shard, int64_t max_tokens, Workspace& workspace);
  float* q;       // [max_tokens, heads, head_dim]
  float* k;       // [max_tokens, kv_heads, head_dim]
  float* v;       // [max_tokens, kv_heads, head_dim]
  float* pooled;  // [max_tokens, heads, head_dim]
};

class Attention {
 public:
  static absl::StatusOr<std::unique_ptr<Attention>> Load(const ModelConfig& config, const Shard& shard, int layer,
                                                         WeightLoader& loader);

  // x, out: [num_tokens, dim]; out is complete (summed over ranks).
  void Forward(const ForwardContext& context, const RopeTables& rope, const AttentionScratch& scratch,
               const kernels::KvPages& pages, kernels::TensorView<const float, 2> x, kernels::TensorView<float, 2> out) const;

 private:
  void NormHeads(const ForwardContext& context, const Vector& weight, kernels::TensorView<float, 3> x) const;

  const ModelConfig* config_ = nullptr;
  int window_ = 0;  // 0: none
  Range heads_;
  Range kv_heads_;
  Matrix wq_, wk_, wv_, wo_;
  Vector q_bias_, k_bias_, v_bias_;
  Vector o_bias_;  // the first rank's: the product is summed over ranks
  Vector q_norm_, k_norm_;
};

}  // namespace memserve::engine
