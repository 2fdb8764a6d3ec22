// Element-wise products of the feed-forward and of the memory layer's epilogue. silu(a) = a / (1 + exp(−a)).
// Each output depends on its own inputs alone. Requires agreeing shapes; zero tokens is fine.
#pragma once

#include "kernels/tensor.h"

namespace memserve::kernels {

// out[t, i] = silu(a[t, i]) · b[t, i]. out may be a or b.
// Source: SwiGLU (arXiv 2002.05202) with a = w1 x, b = w3 x; Memory+ (arXiv 2412.09764) with a = W_s x + b_s, b = pooled.
struct SiluProductArgs {
  TensorView<const float, 2> a;  // [num_tokens, n]
  TensorView<const float, 2> b;  // [num_tokens, n]
  TensorView<float, 2> out;      // out: [num_tokens, n]
};

// x[t, :] *= sigmoid(gate[t, 0]): the gated memory layer.
struct SigmoidGateArgs {
  TensorView<const float, 2> gate;  // [num_tokens, 1]
  TensorView<float, 2> x;           // in and out: [num_tokens, n]
};

}  // namespace memserve::kernels
