// The weighted sum of a bag of rows: the gather of a memory layer.
//
//   out[b, c] = Σ_i weights[b, i] · table[rows[b, i]][c]          i ascending, one float32 fma chain per output
//
// In a table whose format has scales the term is (weights[b, i] · scale[row]) · code[row][c]: the product in brackets is rounded to
// float32 once, and takes the place of the weight.
//
// An entry with row -1 is left out (not even multiplied by zero). A bag of no entries gives zeros. The order of the terms is the
// order of the bag in every back end, placement and column split, so that outputs are equal bit for bit.
// If overlay_of_bag[b] >= 0, rows listed in overlays[overlay_of_bag[b]] come from there instead of from the table.
// Source: Memory Layers at Scale (arXiv 2412.09764), the value lookup; torch.nn.EmbeddingBag(mode="sum", per_sample_weights).
// Requires agreeing shapes and every row in [-1, table rows); a violation is the caller's bug. Row offsets are 64-bit.
#pragma once

#include "kernels/row_store.h"
#include "kernels/tensor.h"

namespace memserve::kernels {

struct EmbeddingBagArgs {
  RowStore* table = nullptr;
  TensorView<const int32_t, 2> rows;      // [num_bags, bag]
  TensorView<const float, 2> weights;     // [num_bags, bag]
  TensorView<float, 2> out;               // out: [num_bags, columns of the store]
  TensorView<const int32_t, 1> overlay_of_bag;            // optional: [num_bags], -1 for none; host memory
  const RowOverlay* const* overlays = nullptr;            // what overlay_of_bag indexes
};

}  // namespace memserve::kernels
