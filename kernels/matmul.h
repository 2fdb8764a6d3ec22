// Product of activations with a weight matrix.
//
//   out[m, n] = bias[n] + Σ_k x[m, k] · weight[n, k]
//
// One output is one chain of float32 fused multiply-adds over ascending k that starts at 0; the bias is added last. The chain is
// the same at every number of rows m and threads, so a row's result does not depend on its neighbours. x is rounded to the
// weight's activation type first (bf16 × bf16 products are exact in float32).
// Requires weight groups 1 and agreeing shapes; a violation is the caller's bug. m = 0 is fine.
#pragma once

#include "kernels/tensor.h"
#include "kernels/weight_matrix.h"

namespace memserve::kernels {

struct MatMulArgs {
  TensorView<const float, 2> x;           // [m, k]
  const WeightMatrix* weight = nullptr;   // n × k
  TensorView<const float, 1> bias;        // optional: [n]
  TensorView<float, 2> out;               // out: [m, n]
};

}  // namespace memserve::kernels
