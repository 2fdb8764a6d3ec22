// Dot products of chosen rows with the token's own vector: the first half of a PEER layer.
//
//   out[t, i] = Σ_c table[rows[t, i]][c] · x[t, first_column + c]      over the columns of the store, float32, fixed order;
//                                                                      a row's scale, where it has one, multiplies the sum
//
// An entry with row -1 gives 0. With the table split by columns over ranks, the sums of the ranks are added by an all-reduce.
// Source: PEER (arXiv 2407.04153), equation of a single-neuron expert, u(x)ᵀ·x.
// Requires agreeing shapes, x as wide as the whole table; a violation is the caller's bug.
#pragma once

#include "kernels/row_store.h"
#include "kernels/tensor.h"

namespace memserve::kernels {

struct RowDotArgs {
  RowStore* table = nullptr;
  TensorView<const int32_t, 2> rows;  // [num_tokens, bag]
  TensorView<const float, 2> x;       // [num_tokens, dim of the table]
  TensorView<float, 2> out;           // out: [num_tokens, bag]
};

// weights[t, i] *= gelu(dots[t, i]), the exact gelu: x · Φ(x) = 0.5 x (1 + erf(x / √2)).
struct GeluScaleArgs {
  TensorView<const float, 2> dots;  // [num_tokens, bag]
  TensorView<float, 2> weights;     // in and out: [num_tokens, bag]
};

}  // namespace memserve::kernels
