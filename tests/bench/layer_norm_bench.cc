#include "kernels/layer_norm.h"

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {

void BenchLayerNorm() {
  Bench bench("layer_norm");
  const int64_t dim = ShapeOf(FLAGS_dim, 512);
  const auto weight = bench.New<float, 1>({dim}, bench.Reals(dim));
  const auto bias = bench.New<float, 1>({dim}, bench.Reals(dim));
  for (int64_t batch : bench.batches()) {
    const auto x = bench.New<float, 2>({batch, dim}, bench.Reals(batch * dim));
    const auto out = bench.New<float, 2>({batch, dim});
    bench.Report(
        absl::StrFormat("dim %d", dim), batch, 2.0 * batch * dim * sizeof(float), 8.0 * batch * dim, [](int64_t) {},
        [&](int64_t) { bench.backend().LayerNorm({.x = x.view, .weight = weight.view, .bias = bias.view, .out = out.view}); });
  }
}

}  // namespace memserve::bench
