// The dense feed-forward (SwiGLU): out = W_2 (silu(W_1 x + b_1) ⊙ (W_3 x + b_3)) + b_2, biases only where the model has them.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine/model/shard.h"
#include "engine/model/workspace.h"

namespace memserve::engine {

struct FeedForwardScratch {
  FeedForwardScratch(const ModelConfig& config, const Shard& shard, int64_t max_tokens, Workspace& workspace);
  float* gate;  // [max_tokens, columns of this rank]
  float* up;    // [max_tokens, columns of this rank]
};

class FeedForward {
 public:
  static absl::StatusOr<std::unique_ptr<FeedForward>> Load(const ModelConfig& config, const Shard& shard, int layer,
                                                           WeightLoader& loader);

  // x, out: [num_tokens, dim]; out is complete (summed over ranks).
  void Forward(const ForwardContext& context, const FeedForwardScratch& scratch, kernels::TensorView<const float, 2> x,
               kernels::TensorView<float, 2> out) const;

 private:
  Range columns_;
  Matrix w1_, w2_, w3_;
  Vector w1_bias_, w3_bias_;
  Vector w2_bias_;  // the first rank's: the product is summed over ranks
};

}  // namespace memserve::engine
