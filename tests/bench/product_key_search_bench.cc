#include "kernels/product_key_search.h"

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {

void BenchSearch() {
  Bench bench("search");
  const int64_t mem_heads = ShapeOf(FLAGS_heads, 4), n_keys = ShapeOf(FLAGS_n_keys, 1024);
  const int64_t half_dim = ShapeOf(FLAGS_half_dim, 256), knn = ShapeOf(FLAGS_knn, 32);
  const DType format = Format();
  const int64_t key_bytes = mem_heads * 2 * n_keys * half_dim * SizeOf(format);
  std::vector<std::unique_ptr<kernels::WeightMatrix>> half_keys;
  for (int64_t copy = Bench::ColdCopies(key_bytes); copy > 0; --copy) {
    half_keys.push_back(
        bench.NewWeights({.groups = mem_heads * 2, .n = n_keys, .k = half_dim, .dtype = format, .activation = format}));
  }
  for (int64_t batch : bench.batches()) {
    auto query = bench.New<float, 4>({batch, mem_heads, 2, half_dim});
    const auto scores = bench.New<float, 3>({batch, mem_heads, knn}), weights = bench.New<float, 3>({batch, mem_heads, knn});
    const auto rows = bench.New<int32_t, 3>({batch, mem_heads, knn});
    const double bytes = static_cast<double>(key_bytes) + 4.0 * batch * mem_heads * (2 * half_dim + 3 * knn);
    bench.Report(
        absl::StrFormat("heads %d, n_keys %d × %d %s, knn %d", mem_heads, n_keys, half_dim, NameOf(format), knn), batch, bytes,
        2.0 * batch * mem_heads * 2 * n_keys * half_dim,
        [&](int64_t) { bench.Copy(query, bench.Reals(batch * mem_heads * 2 * half_dim)); },
        [&](int64_t i) {
          bench.backend().ProductKeySearch({.query = query.view,
                                            .half_keys = half_keys[i % half_keys.size()].get(),
                                            .scores = scores.view,
                                            .weights = weights.view,
                                            .rows = rows.view});
        });
  }
}

}  // namespace memserve::bench
