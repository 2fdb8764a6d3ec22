// What is done with the rows that a search found, before the value table is read: a bag is what one token reads in one layer.
//
// An entry with row -1 is none. Requires agreeing shapes, indices in their ranges and no token twice; a violation is the caller's
// bug.
#pragma once

#include "kernels/tensor.h"

namespace memserve::kernels {

// Leaves out the entries of masked rows: their row becomes -1, their weight 0. The other weights stay as they are: they are not
// made to sum to 1 again, so that the outcome is that of a table whose masked rows are zero.
//
//   rows[t, i] = -1, weights[t, i] = 0      where rows[t, i] is in masked[begin … end), begin and end those of t's sequence
struct MaskRowsArgs {
  TensorView<const int32_t, 1> sequence;  // [num_tokens]
  TensorView<const int32_t, 1>
      masked_end;                       // [num_sequences]: where a sequence's masked rows end; they begin where the last one's do
  TensorView<const int32_t, 1> masked;  // [all masked rows], ascending within a sequence
  TensorView<int32_t, 2> rows;          // in and out: [num_tokens, bag]
  TensorView<float, 2> weights;         // in and out: [num_tokens, bag]
};

// Copies the bags of chosen tokens.
//
//   out_rows[s, :] = rows[tokens[s], :], out_weights[s, :] = weights[tokens[s], :]
struct SelectBagsArgs {
  TensorView<const int32_t, 1> tokens;  // [num_selected], each in [0, num_tokens)
  TensorView<const int32_t, 2> rows;    // [num_tokens, bag]
  TensorView<const float, 2> weights;   // [num_tokens, bag]
  TensorView<int32_t, 2> out_rows;      // out: [num_selected, bag]
  TensorView<float, 2> out_weights;     // out: [num_selected, bag]
};

// Counts reads: counts[rows[t, i]] += 1 for every entry, but stays at 2³² - 1 once it is there. A row that is found twice counts
// twice.
struct CountRowsArgs {
  TensorView<const int32_t, 2> rows;  // [num_tokens, bag], each in [-1, table rows)
  TensorView<uint32_t, 1> counts;     // in and out: [table rows]
};

}  // namespace memserve::kernels
