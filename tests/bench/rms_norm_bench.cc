#include "kernels/rms_norm.h"

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {

void BenchRmsNorm() {
  Bench bench("rms_norm");
  const int64_t dim = ShapeOf(FLAGS_dim, 2048);
  const auto weight = bench.New<float, 1>({dim}, bench.Reals(dim));
  for (int64_t batch : bench.batches()) {
    const auto x = bench.New<float, 2>({batch, dim}, bench.Reals(batch * dim));
    const auto delta = bench.New<float, 2>({batch, dim}, bench.Reals(batch * dim, -1e-3f, 1e-3f));
    const auto out = bench.New<float, 2>({batch, dim});
    bench.Report(
        absl::StrFormat("dim %d", dim), batch, 4.0 * batch * dim * sizeof(float), 5.0 * batch * dim, [](int64_t) {},
        [&](int64_t) { bench.backend().RmsNorm({.x = x.view, .delta = delta.view, .weight = weight.view, .out = out.view}); });
  }
}

}  // namespace memserve::bench
