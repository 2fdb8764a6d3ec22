// Rotary position embedding, in place.
//
//   (a, b) -> (a · cos[p, i] − b · sin[p, i],  a · sin[p, i] + b · cos[p, i])      p = positions[t], i < half_dim
//
// The pair (a, b) of index i is (2i, 2i + 1) of the head (interleaved: the original Llama) or (i, half_dim + i) (halves: Hugging
// Face). Angles come as tables, so any frequency scaling is the engine's affair. 2 · half_dim <= head_dim: the rest stays as it is.
// Each product and sum is rounded once or fused; results depend on the element alone.
// Source: RoFormer (arXiv 2104.09864).
#pragma once

#include "kernels/tensor.h"

namespace memserve::kernels {

enum class RopePairing : uint8_t { kInterleaved, kHalves };

struct RopeArgs {
  TensorView<float, 3> x;                    // in and out: [num_tokens, heads, head_dim]
  TensorView<const int32_t, 1> positions;    // [num_tokens], each below the rows of the tables
  TensorView<const float, 2> cos;            // [max_positions, half_dim]
  TensorView<const float, 2> sin;            // [max_positions, half_dim]
  RopePairing pairing = RopePairing::kInterleaved;
};

}  // namespace memserve::kernels
