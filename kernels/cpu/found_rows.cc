// Plain code for all instruction sets: it waits for memory, not for arithmetic.
#include "kernels/found_rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/cpu/functions.h"
#include "kernels/cpu/row_store.h"

namespace memserve::kernels::cpu {

void MaskRows(Context& context, const MaskRowsArgs& args) {
  const int64_t num_tokens = args.rows.dim(0), bag = args.rows.dim(1);
  for (int64_t t = 0; t < num_tokens; ++t) {
    MEMSERVE_CHECK(args.sequence(t) >= 0 && args.sequence(t) < args.masked_end.dim(0));
  }
  int32_t begin = 0;
  for (int64_t s = 0; s < args.masked_end.dim(0); ++s) {
    MEMSERVE_CHECK(begin <= args.masked_end(s) && args.masked_end(s) <= args.masked.dim(0));
    begin = args.masked_end(s);
  }
  context.pool.ParallelFor(num_tokens, args.rows.size() * 10.0, [&](int64_t t, int) {
    const int32_t s = args.sequence(t);
    const int32_t* const first = args.masked.data + (s == 0 ? 0 : args.masked_end(s - 1));
    const int32_t* const last = args.masked.data + args.masked_end(s);
    if (first == last) return;
    for (int64_t i = t * bag; i < (t + 1) * bag; ++i) {
      if (!std::binary_search(first, last, args.rows.data[i])) continue;
      args.rows.data[i] = -1;
      args.weights.data[i] = 0;
    }
  });
}

void SelectBags(const SelectBagsArgs& args) {
  const int64_t bag = args.rows.dim(1);
  for (int64_t s = 0; s < args.tokens.dim(0) && bag > 0; ++s) {
    const int64_t t = args.tokens(s);
    MEMSERVE_CHECK(t >= 0 && t < args.rows.dim(0));
    std::memcpy(args.out_rows.data + s * bag, args.rows.data + t * bag, bag * sizeof(int32_t));
    std::memcpy(args.out_weights.data + s * bag, args.weights.data + t * bag, bag * sizeof(float));
  }
}

// Each thread looks at all entries and counts those in its part of the table: no counter has two writers.
void CountRows(Context& context, const CountRowsArgs& args) {
  const int64_t entries = args.rows.size(), table_rows = args.counts.dim(0);
  CheckRows({.rows = table_rows}, args.rows);
  const auto count = [&](int64_t begin, int64_t end) {
    constexpr int64_t kAhead = 16;
    const auto in_part = [&](int32_t row) { return row >= begin && row < end; };
    for (int64_t i = 0; i < entries; ++i) {
      if (i + kAhead < entries && in_part(args.rows.data[i + kAhead])) __builtin_prefetch(args.counts.data + args.rows.data[i + kAhead], 1);
      const int32_t row = args.rows.data[i];
      if (!in_part(row)) continue;
      uint32_t& counter = args.counts.data[row];
      counter += counter < std::numeric_limits<uint32_t>::max() ? 1 : 0;
    }
  };
  constexpr double kEntryNs = 3;
  const int64_t parts = context.pool.size();
  if (parts == 1 || entries * kEntryNs < ThreadPool::kWorthSharingNs) return count(0, table_rows);
  context.pool.ParallelFor(parts, entries * kEntryNs, [&](int64_t p, int) { count(p * table_rows / parts, (p + 1) * table_rows / parts); });
}

}  // namespace memserve::kernels::cpu
