// Plain code for all instruction sets: it waits for memory, not for arithmetic.
#include "kernels/found_rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/cpu/functions.h"

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

// Counters are fetched ahead: in a large table nearly each is a miss of its own. One thread alone: two would have to agree on whose
// counter is whose, which costs more than it saves (`memserve-bench count`: 10 ns a read in parts of the table, less than 4 ns like
// this).
void CountRows(const CountRowsArgs& args) {
  constexpr int64_t kRun = 64;
  constexpr int64_t kCached = 256 << 10;  // bytes of counters that stay near
  const int64_t entries = args.rows.size(), table_rows = args.counts.dim(0);
  const bool far = table_rows * static_cast<int64_t>(sizeof(uint32_t)) > kCached;
  const int32_t* const rows = args.rows.data;
  uint32_t* const counts = args.counts.data;
  const auto fetch = [&](int64_t begin) {
    for (int64_t i = begin; i < std::min(begin + kRun, entries); ++i)
      __builtin_prefetch(counts + rows[i], 1);  // of no row: harmless
  };
  bool good = true;
  if (far) fetch(0);
  for (int64_t begin = 0; begin < entries; begin += kRun) {
    if (far) fetch(begin + kRun);
    for (int64_t i = begin; i < std::min(begin + kRun, entries); ++i) {
      const int32_t row = rows[i];
      if (static_cast<uint64_t>(static_cast<int64_t>(row)) >= static_cast<uint64_t>(table_rows)) {
        good &= row == -1;
        continue;
      }
      const uint32_t count = counts[row];
      counts[row] = count + (count < std::numeric_limits<uint32_t>::max() ? 1 : 0);
    }
  }
  MEMSERVE_CHECK(good);
}

}  // namespace memserve::kernels::cpu
