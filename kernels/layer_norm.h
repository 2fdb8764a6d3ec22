// Normalises by mean and standard deviation.
//
//   mean[t]   = mean_d(x[t, d]),   var[t] = mean_d((x[t, d] − mean[t])²)
//   out[t, d] = (x[t, d] − mean[t]) / sqrt(var[t] + eps) · weight[d] + bias[d]
//
// Sums in float32 in a fixed order that depends on dim alone. `out` may be `x`.
// Source: Layer Normalization (arXiv 1607.06450). Requires agreeing shapes; zero tokens is fine.
#pragma once

#include "kernels/tensor.h"

namespace memserve::kernels {

struct LayerNormArgs {
  TensorView<const float, 2> x;       // [num_tokens, dim]
  TensorView<const float, 1> weight;  // [dim]
  TensorView<const float, 1> bias;    // optional: [dim]
  float eps = 1e-5f;
  TensorView<float, 2> out;  // out: [num_tokens, dim]
};

}  // namespace memserve::kernels
