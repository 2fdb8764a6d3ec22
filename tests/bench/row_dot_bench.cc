#include "kernels/row_dot.h"

#include "kernels/row_format.h"
#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {

void BenchRowDot() {
  Bench bench("row_dot");
  const int64_t num_rows = ShapeOf(FLAGS_rows, int64_t{1} << 20), dim = ShapeOf(FLAGS_dim, 1024), bag = ShapeOf(FLAGS_bag, 128);
  const DType format = RowFormat();
  const auto table = bench.NewTable({.rows = num_rows, .dim = dim, .end_column = dim, .format = format});
  for (int64_t batch : bench.batches()) {
    auto rows = bench.New<int32_t, 2>({batch, bag});
    const auto x = bench.New<float, 2>({batch, dim}, bench.Reals(batch * dim)), out = bench.New<float, 2>({batch, bag});
    bench.Report(
        absl::StrFormat("%d × %d %s, bag %d", num_rows, dim, NameOf(format), bag), batch,
        1.0 * batch * bag * (RowBytes(format, dim) + (HasScales(format) ? sizeof(float) : 0)) + 1.0 * batch * dim * sizeof(float), 2.0 * batch * bag * dim,
        [&](int64_t) { bench.Copy(rows, bench.Indices(batch * bag, num_rows)); },
        [&](int64_t) { bench.backend().RowDot({.table = table.get(), .rows = rows.view, .x = x.view, .out = out.view}); });
  }
}

}  // namespace memserve::bench
