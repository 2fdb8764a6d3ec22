#include "kernels/embedding.h"

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {

void BenchEmbedding() {
  Bench bench("embedding");
  const int64_t vocab = ShapeOf(FLAGS_vocab, 128256), dim = ShapeOf(FLAGS_dim, 2048);
  const DType format = Format();
  const auto weight = bench.NewWeights({.n = vocab, .k = dim, .dtype = format});
  for (int64_t batch : bench.batches()) {
    auto token_ids = bench.New<int32_t, 1>({batch});
    const auto from_slot = bench.New<int32_t, 1>({batch}, std::vector<int32_t>(batch, -1));
    const auto out = bench.New<float, 2>({batch, dim});
    bench.Report(
        absl::StrFormat("%d × %d %s", vocab, dim, NameOf(format)), batch, 1.0 * batch * dim * SizeOf(format), 0,
        [&](int64_t) { bench.Copy(token_ids, bench.Indices(batch, vocab)); },
        [&](int64_t) {
          bench.backend().Embedding(
              {.token_ids = token_ids.view, .from_slot = from_slot.view, .weight = weight.get(), .out = out.view});
        });
  }
}

}  // namespace memserve::bench
