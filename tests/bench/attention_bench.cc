#include "kernels/attention.h"

#include <algorithm>
#include <numeric>

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

namespace memserve::bench {

void BenchAttention() {
  Bench bench("attention");
  constexpr int64_t kPageSize = 16;
  const int64_t heads = ShapeOf(FLAGS_heads, 32), kv_heads = ShapeOf(FLAGS_kv_heads, 8), head_dim = ShapeOf(FLAGS_head_dim, 64);
  const int64_t context = ShapeOf(FLAGS_context, 1024), queries = ShapeOf(FLAGS_queries, 1);
  const DType format = RowFormat() == DType::kI8 ? DType::kI8 : Format();
  for (int64_t batch : bench.batches()) {
    const int64_t pages_each = (context + queries + kPageSize - 1) / kPageSize, num_tokens = batch * queries;
    kernels::KvPages shape{
        .dtype = format, .num_pages = batch * pages_each, .page_size = kPageSize, .kv_heads = kv_heads, .head_dim = head_dim};
    std::vector<kernels::KvPages> layers;  // take turns, as the layers of a model do
    std::vector<Tensor<char, 1>> memory;
    for (int64_t copy = Bench::ColdCopies(2 * shape.bytes_each()); copy > 0; --copy) {
      memory.push_back(bench.New<char, 1>({shape.bytes_each()}));
      shape.keys = memory.back().view.data;
      memory.push_back(bench.New<char, 1>({shape.bytes_each()}));
      shape.values = memory.back().view.data;
      layers.push_back(shape);
      const int64_t slots_each = pages_each * kPageSize, width = kv_heads * head_dim;
      const auto k = bench.New<float, 3>({slots_each, kv_heads, head_dim}, bench.Reals(slots_each * width));
      for (int64_t b = 0; b < batch; ++b) {
        std::vector<int64_t> slots(slots_each);
        std::iota(slots.begin(), slots.end(), b * slots_each);
        const auto device_slots = bench.New<int64_t, 1>({slots_each}, slots);
        bench.backend().KvWrite({.k = k.view, .v = k.view, .slots = device_slots.view, .pages = shape});
      }
    }
    std::vector<int32_t> block_table(batch * pages_each), sequence, positions;
    std::iota(block_table.begin(), block_table.end(), 0);
    std::shuffle(block_table.begin(), block_table.end(), bench.random());
    for (int64_t t = 0; t < num_tokens; ++t) {
      sequence.push_back(static_cast<int32_t>(t / queries));
      positions.push_back(static_cast<int32_t>(context + t % queries));
    }
    const auto q = bench.New<float, 3>({num_tokens, heads, head_dim}, bench.Reals(num_tokens * heads * head_dim));
    const auto out = bench.New<float, 3>({num_tokens, heads, head_dim});
    const auto block_tables = bench.New<int32_t, 2>({batch, pages_each}, block_table);
    const auto device_sequence = bench.New<int32_t, 1>({num_tokens}, sequence),
               device_positions = bench.New<int32_t, 1>({num_tokens}, positions);
    const double keys_seen = static_cast<double>(context) + (queries + 1) / 2.0;
    const double bytes = 2.0 * batch * (context + queries) * kv_heads * head_dim * SizeOf(format) +
                         2.0 * num_tokens * heads * head_dim * sizeof(float);
    bench.Report(
        absl::StrFormat("context %d + %d, heads %d / %d × %d %s", context, queries, heads, kv_heads, head_dim, NameOf(format)),
        batch, bytes, 4.0 * static_cast<double>(num_tokens * heads * head_dim) * keys_seen, [](int64_t) {},
        [&](int64_t i) {
          bench.backend().Attention({.q = q.view,
                                     .sequence = device_sequence.view,
                                     .positions = device_positions.view,
                                     .block_tables = block_tables.view,
                                     .pages = layers[i % layers.size()],
                                     .queries_per_kv = heads / kv_heads,
                                     .scale = 0.125f,
                                     .out = out.view});
        });
  }
}

}  // namespace memserve::bench
