// Grouped-query attention with rotary positions over the paged KV cache:
//   out = W_o · attention(rope(W_q x), rope(W_k x), W_v x)
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine/model/shard.h"
#include "engine/model/workspace.h"
#include "kernels/attention.h"

namespace memserve::engine {

// cos and sin of position · rope_theta^(−2i / head_dim), computed in double. On the device, [positions, head_dim / 2] each.
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
  void Forward(const ForwardContext& context, const RopeTables& rope, const AttentionScratch& scratch, const kernels::KvPages& pages,
               kernels::TensorView<const float, 2> x, kernels::TensorView<float, 2> out) const;

 private:
  const ModelConfig* config_ = nullptr;
  Range heads_;
  Range kv_heads_;
  Matrix wq_, wk_, wv_, wo_;
};

}  // namespace memserve::engine
