#include "kernels/found_rows.h"

#include "engine/table_queries.h"
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

// What the engine thread does between two steps while somebody asks for row counts: a slice is copied and gone through. The worst
// is a table whose later rows are read more and more, the usual one that of random reads.
void BenchRowStats() {
  Bench bench("row_stats");
  constexpr int64_t kRows = engine::RowStatsScan::kSliceRows;
  for (const bool rising : {false, true}) {
    std::vector<uint32_t> values(kRows);
    for (int64_t i = 0; i < kRows; ++i) values[i] = static_cast<uint32_t>(rising ? i : bench.Indices(1, 20)[0]);
    const auto counts = bench.New<uint32_t, 1>({kRows}, values);
    std::vector<uint32_t> slice(kRows);
    bench.Report(
        absl::StrFormat("a slice of %d rows, top 1000, %s counts", kRows, rising ? "rising" : "random"), 1,
        1.0 * kRows * sizeof(uint32_t), 0, [](int64_t) {},
        [&](int64_t) {
          engine::RowStatsScan scan({.top = 1000}, kRows);
          bench.backend().CopyToHost(slice.data(), counts.view.data, kRows * static_cast<int64_t>(sizeof(uint32_t)));
          scan.Add(slice);
        });
  }
}

// A trace: the bags of an eighth of the tokens.
void BenchSelectBags() {
  Bench bench("select_bags");
  const int64_t bag = ShapeOf(FLAGS_bag, 128);
  for (int64_t batch : bench.batches()) {
    const int64_t selected = (batch + 7) / 8;
    const auto rows = bench.New<int32_t, 2>({batch, bag}, bench.Indices(batch * bag, 1 << 20)),
               out_rows = bench.New<int32_t, 2>({selected, bag});
    const auto weights = bench.New<float, 2>({batch, bag}), out_weights = bench.New<float, 2>({selected, bag});
    const auto tokens = bench.New<int32_t, 1>({selected}, bench.Indices(selected, batch));
    bench.Report(
        absl::StrFormat("%d tokens, bag %d", selected, bag), batch, 4.0 * selected * bag * sizeof(int32_t), 0, [](int64_t) {},
        [&](int64_t) {
          bench.backend().SelectBags({.tokens = tokens.view,
                                      .rows = rows.view,
                                      .weights = weights.view,
                                      .out_rows = out_rows.view,
                                      .out_weights = out_weights.view});
        });
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
