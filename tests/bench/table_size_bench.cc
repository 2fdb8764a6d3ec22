// What a memory layer costs over tables of different size, all else equal: the search grows with n_keys = √rows, the gather is flat
// once rows come from memory and not from a cache.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "kernels/embedding_bag.h"
#include "kernels/product_key_search.h"
#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

ABSL_DECLARE_FLAG(bool, json);
ABSL_DECLARE_FLAG(int64_t, repeat);

namespace memserve::bench {
namespace {

// The search and the gather of one table, for one batch.
class Layer {
 public:
  Layer(Bench& bench, int64_t n_keys, int64_t batch)
      : bench_(bench),
        rows_(n_keys * n_keys),
        bags_(batch),
        mem_heads_(ShapeOf(FLAGS_heads, 4)),
        half_dim_(ShapeOf(FLAGS_half_dim, 256)),
        knn_(ShapeOf(FLAGS_knn, 32)),
        dim_(ShapeOf(FLAGS_dim, 1024)),
        half_keys_(bench.NewWeights({.groups = mem_heads_ * 2, .n = n_keys, .k = half_dim_, .dtype = Format(), .activation = Format()})),
        table_(bench.NewTable({.rows = rows_, .dim = dim_, .end_column = dim_, .format = RowFormat()})),
        query_(bench.New<float, 4>({batch, mem_heads_, 2, half_dim_}, bench.Reals(batch * mem_heads_ * 2 * half_dim_))),
        scores_(bench.New<float, 3>({batch, mem_heads_, knn_})),
        weights_(bench.New<float, 3>({batch, mem_heads_, knn_})),
        found_(bench.New<int32_t, 3>({batch, mem_heads_, knn_})),
        asked_(bench.New<int32_t, 2>({batch, mem_heads_ * knn_})),
        pooled_(bench.New<float, 2>({batch, dim_})) {}

  void Search() {
    bench_.backend().ProductKeySearch({.query = query_.view,
                                       .half_keys = half_keys_.get(),
                                       .scores = scores_.view,
                                       .weights = weights_.view,
                                       .rows = found_.view});
  }
  // Rows asked for at random, anew each time: what a search finds would stay the same and so stay in the cache.
  void Prepare() { bench_.Copy(asked_, bench_.Indices(bags_ * mem_heads_ * knn_, rows_)); }
  void Gather() {
    bench_.backend().EmbeddingBag({.table = table_.get(),
                                   .rows = asked_.view,
                                   .weights = {weights_.view.data, {bags_, mem_heads_ * knn_}},
                                   .out = pooled_.view});
  }

 private:
  Bench& bench_;
  const int64_t rows_, bags_, mem_heads_, half_dim_, knn_, dim_;
  const std::unique_ptr<kernels::WeightMatrix> half_keys_;
  const std::unique_ptr<kernels::RowStore> table_;
  Tensor<float, 4> query_;
  Tensor<float, 3> scores_, weights_;
  Tensor<int32_t, 3> found_;
  Tensor<int32_t, 2> asked_;
  Tensor<float, 2> pooled_;
};

template <typename Run>
double SecondsOf(const Run& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

void BenchTableSize() {
  Bench bench("table_size");
  for (const int64_t batch : bench.batches()) {
    for (const int64_t n_keys : {128, 181, 256, 362, 512, 724, 1024}) {
      Layer layer(bench, n_keys, batch);
      layer.Search();
      std::vector<double> search, gather;
      for (int64_t i = 0; i < absl::GetFlag(FLAGS_repeat); ++i) {
        layer.Prepare();
        search.push_back(SecondsOf([&] { layer.Search(); }));
        gather.push_back(SecondsOf([&] { layer.Gather(); }));
      }
      if (absl::GetFlag(FLAGS_json)) {
        std::printf(R"({"name": "table_size", "rows": %ld, "n_keys": %ld, "batch": %ld, "search_seconds": %.9g, "gather_seconds": %.9g})"
                    "\n",
                    n_keys * n_keys, n_keys, batch, Median(search), Median(gather));
      } else {
        std::printf("table_size rows %ld (n_keys %ld) batch %ld: search %.1f µs, gather %.1f µs\n", n_keys * n_keys, n_keys, batch,
                    Median(search) * 1e6, Median(gather) * 1e6);
      }
      std::fflush(stdout);
    }
  }
}

}  // namespace memserve::bench
