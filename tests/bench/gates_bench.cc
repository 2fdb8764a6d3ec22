#include "kernels/gates.h"

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {

void BenchSilu() {
  Bench bench("silu");
  const int64_t n = ShapeOf(FLAGS_n, 8192);
  for (int64_t batch : bench.batches()) {
    const auto a = bench.New<float, 2>({batch, n}, bench.Reals(batch * n, -8, 8)),
               b = bench.New<float, 2>({batch, n}, bench.Reals(batch * n));
    const auto out = bench.New<float, 2>({batch, n});
    bench.Report(
        absl::StrFormat("n %d", n), batch, 3.0 * batch * n * sizeof(float), 20.0 * batch * n, [](int64_t) {},
        [&](int64_t) { bench.backend().SiluProduct({.a = a.view, .b = b.view, .out = out.view}); });
  }
}

}  // namespace memserve::bench
