#include "kernels/sampling.h"

#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

ABSL_FLAG(double, temperature, 1, "of sampling; 0: greedy");
ABSL_FLAG(int64_t, top_k, 0, "of sampling; 0: all");
ABSL_FLAG(double, top_p, 1, "of sampling; 1: all");

namespace memserve::bench {

void BenchSample() {
  Bench bench("sample");
  const int64_t vocab = ShapeOf(FLAGS_vocab, 128256);
  const kernels::SamplingSlot slot{.temperature = static_cast<float>(absl::GetFlag(FLAGS_temperature)),
                                   .top_k = static_cast<int32_t>(absl::GetFlag(FLAGS_top_k)),
                                   .top_p = static_cast<float>(absl::GetFlag(FLAGS_top_p))};
  for (int64_t batch : bench.batches()) {
    const auto logits = bench.New<float, 2>({batch, vocab}, bench.Reals(batch * vocab, -10, 10));
    auto slots = bench.New<kernels::SamplingSlot, 1>({batch});
    const auto tokens = bench.New<int32_t, 1>({batch});
    const auto logprobs = bench.New<float, 1>({batch});
    bench.Report(
        absl::StrFormat("vocab %d, temperature %g, top_k %d, top_p %g", vocab, slot.temperature, slot.top_k, slot.top_p), batch,
        1.0 * batch * vocab * sizeof(float), 0,
        [&](int64_t i) {
          std::vector<kernels::SamplingSlot> drawn(batch, slot);
          for (int64_t s = 0; s < batch; ++s) drawn[s].seed = i * batch + s;
          bench.Copy(slots, drawn);
        },
        [&](int64_t) {
          bench.backend().Sample({.logits = logits.view, .slots = slots.view, .tokens = tokens.view, .logprobs = logprobs.view});
        });
  }
}

}  // namespace memserve::bench
