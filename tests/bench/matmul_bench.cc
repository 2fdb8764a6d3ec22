#include "kernels/matmul.h"

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {
namespace {

void BenchProduct(const char* name, int64_t n, int64_t k) {
  Bench bench(name);
  const DType format = Format();
  std::vector<std::unique_ptr<kernels::WeightMatrix>> weights;
  for (int64_t copy = Bench::ColdCopies(n * k * SizeOf(format)); copy > 0; --copy) {
    weights.push_back(bench.NewWeights({.n = n, .k = k, .dtype = format, .activation = format}));
  }
  for (int64_t batch : bench.batches()) {
    const auto x = bench.New<float, 2>({batch, k}, bench.Reals(batch * k)), out = bench.New<float, 2>({batch, n});
    const double bytes = 1.0 * n * k * SizeOf(format) + 1.0 * batch * (n + k) * sizeof(float);
    bench.Report(
        absl::StrFormat("%d × %d %s", n, k, NameOf(format)), batch, bytes, 2.0 * batch * n * k, [](int64_t) {},
        [&](int64_t i) { bench.backend().MatMul({.x = x.view, .weight = weights[i % weights.size()].get(), .out = out.view}); });
  }
}

}  // namespace

void BenchMatMul() { BenchProduct("matmul", ShapeOf(FLAGS_n, 2048), ShapeOf(FLAGS_k, 2048)); }

void BenchLogits() { BenchProduct("logits", ShapeOf(FLAGS_vocab, 128256), ShapeOf(FLAGS_dim, 2048)); }

}  // namespace memserve::bench
