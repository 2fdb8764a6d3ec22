#include "kernels/rope.h"

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {

void BenchRope() {
  Bench bench("rope");
  constexpr int64_t kPositions = 8192;
  const int64_t heads = ShapeOf(FLAGS_heads, 32), head_dim = ShapeOf(FLAGS_head_dim, 64);
  const auto cos = bench.New<float, 2>({kPositions, head_dim / 2}, bench.Reals(kPositions * (head_dim / 2)));
  const auto sin = bench.New<float, 2>({kPositions, head_dim / 2}, bench.Reals(kPositions * (head_dim / 2)));
  for (int64_t batch : bench.batches()) {
    const auto x = bench.New<float, 3>({batch, heads, head_dim}, bench.Reals(batch * heads * head_dim));
    auto positions = bench.New<int32_t, 1>({batch});
    bench.Report(
        absl::StrFormat("heads %d × %d", heads, head_dim), batch, 2.0 * batch * heads * head_dim * sizeof(float),
        3.0 * batch * heads * head_dim, [&](int64_t) { bench.Copy(positions, bench.Indices(batch, kPositions)); },
        [&](int64_t) { bench.backend().Rope({.x = x.view, .positions = positions.view, .cos = cos.view, .sin = sin.view}); });
  }
}

}  // namespace memserve::bench
