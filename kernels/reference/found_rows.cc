#include "kernels/found_rows.h"

#include <limits>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

void MaskRows(const MaskRowsArgs& args) {
  const int64_t num_tokens = args.rows.dim(0), bag = args.rows.dim(1);
  MEMSERVE_CHECK(args.weights.shape == args.rows.shape);
  MEMSERVE_CHECK_EQ(args.sequence.dim(0), num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int32_t s = args.sequence(t);
    MEMSERVE_CHECK(0 <= s && s < args.masked_end.dim(0));
    const int32_t begin = s == 0 ? 0 : args.masked_end(s - 1), end = args.masked_end(s);
    MEMSERVE_CHECK(0 <= begin && begin <= end && end <= args.masked.dim(0));
    for (int64_t i = 0; i < bag; ++i) {
      for (int32_t m = begin; m < end; ++m) {
        if (args.rows(t, i) != args.masked(m)) continue;
        args.rows(t, i) = -1;
        args.weights(t, i) = 0;
      }
    }
  }
}

void SelectBags(const SelectBagsArgs& args) {
  const int64_t selected = args.tokens.dim(0), bag = args.rows.dim(1);
  MEMSERVE_CHECK(args.weights.shape == args.rows.shape);
  MEMSERVE_CHECK(args.out_weights.shape == args.out_rows.shape);
  MEMSERVE_CHECK_EQ(args.out_rows.dim(0), selected);
  MEMSERVE_CHECK_EQ(args.out_rows.dim(1), bag);
  for (int64_t s = 0; s < selected; ++s) {
    const int64_t t = args.tokens(s);
    MEMSERVE_CHECK(0 <= t && t < args.rows.dim(0));
    for (int64_t i = 0; i < bag; ++i) {
      args.out_rows(s, i) = args.rows(t, i);
      args.out_weights(s, i) = args.weights(t, i);
    }
  }
}

void CountRows(const CountRowsArgs& args) {
  for (int64_t i = 0; i < args.rows.size(); ++i) {
    const int64_t row = args.rows.data[i];
    MEMSERVE_CHECK(-1 <= row && row < args.counts.dim(0));
    if (row >= 0 && args.counts(row) < std::numeric_limits<uint32_t>::max()) ++args.counts(row);
  }
}

}  // namespace memserve::kernels::reference
