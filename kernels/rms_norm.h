// Adds what the last block computed to the residual stream, then normalises it by its root mean square.
//
//   x[t, :]  += delta[t, :]                                    if delta is given and (delta_on absent or delta_on[t] != 0)
//   out[t, d] = x[t, d] / sqrt(mean_d(x[t, d]²) + eps) · weight[d]          if out is given
//
// Sums in float32 in a fixed order that depends on dim alone.
// Source: RMSNorm (arXiv 1910.07467). Requires agreeing shapes; zero tokens is fine.
#pragma once

#include "kernels/tensor.h"

namespace memserve::kernels {

struct RmsNormArgs {
  TensorView<float, 2> x;                   // in and out: [num_tokens, dim]
  TensorView<const float, 2> delta;         // optional: [num_tokens, dim]
  TensorView<const int32_t, 1> delta_on;    // optional: [num_tokens]
  TensorView<const float, 1> weight;        // [dim]
  float eps = 1e-5f;
  TensorView<float, 2> out;                 // out, optional: [num_tokens, dim]
};

}  // namespace memserve::kernels
