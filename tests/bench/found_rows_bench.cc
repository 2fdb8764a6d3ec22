#include "kernels/found_rows.h"

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {

// Fresh random rows each time: what a gather costs is beside it in `memserve-bench gather`.
void BenchCount() {
  Bench bench("count");
  const int64_t num_rows = ShapeOf(FLAGS_rows, int64_t{1} << 20), bag = ShapeOf(FLAGS_bag, 128);
  const auto counts = bench.New<uint32_t, 1>({num_rows});
  for (int64_t batch : bench.batches()) {
    auto rows = bench.New<int32_t, 2>({batch, bag});
    bench.Report(
        absl::StrFormat("%d rows, bag %d", num_rows, bag), batch, 2.0 * batch * bag * sizeof(uint32_t), 0,
        [&](int64_t) { bench.Copy(rows, bench.Indices(batch * bag, num_rows)); },
        [&](int64_t) { bench.backend().CountRows({.rows = rows.view, .counts = counts.view}); });
  }
}

// As many masked rows as a request may name.
void BenchMask() {
  Bench bench("mask");
  const int64_t num_rows = ShapeOf(FLAGS_rows, int64_t{1} << 20), bag = ShapeOf(FLAGS_bag, 128);
  constexpr int64_t kMasked = 1024;
  std::vector<int32_t> masked;
  for (int64_t i = 0; i < kMasked; ++i) masked.push_back(static_cast<int32_t>(i * num_rows / kMasked));
  const auto masked_rows = bench.New<int32_t, 1>({kMasked}, masked), masked_end = bench.New<int32_t, 1>({1}, {kMasked});
  for (int64_t batch : bench.batches()) {
    auto rows = bench.New<int32_t, 2>({batch, bag});
    const auto weights = bench.New<float, 2>({batch, bag});
    const auto sequence = bench.New<int32_t, 1>({batch}, std::vector<int32_t>(batch, 0));
    bench.Report(
        absl::StrFormat("%d masked rows, bag %d", kMasked, bag), batch, 2.0 * batch * bag * sizeof(int32_t), 0,
        [&](int64_t) { bench.Copy(rows, bench.Indices(batch * bag, num_rows)); },
        [&](int64_t) {
          bench.backend().MaskRows({.sequence = sequence.view,
                                    .masked_end = masked_end.view,
                                    .masked = masked_rows.view,
                                    .rows = rows.view,
                                    .weights = weights.view});
        });
  }
}

}  // namespace memserve::bench
