#include "tests/bench/bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/numbers.h"

ABSL_FLAG(int, threads, 0, "threads of the back end; 0: one per core");
ABSL_FLAG(std::string, isa, "auto", "instruction set to pin");
ABSL_FLAG(std::vector<std::string>, batch, {"1"},
          "tokens (or sequences, or bags) at once; a comma-separated list gives a line each");
ABSL_FLAG(int64_t, repeat, 50, "timed runs of each; the median is printed");
ABSL_FLAG(bool, json, false, "one JSON object a line");
ABSL_FLAG(
    int64_t, cold_bytes, int64_t{256} << 20,
    "weights, keys and pages take turns among so many bytes, so that each run finds its own in memory and not in a cache; 0: hot");
ABSL_FLAG(std::string, format, "bf16", "how weights, keys, pages and rows are held: f32 or bf16; rows also int8 or int4");

// 0: the operation's default
ABSL_FLAG(int64_t, rows, 0, "rows of the value table");
ABSL_FLAG(int64_t, dim, 0, "width of a row, or of the model");
ABSL_FLAG(int64_t, bag, 0, "rows of one bag");
ABSL_FLAG(int64_t, n, 0, "outputs of a matrix");
ABSL_FLAG(int64_t, k, 0, "inputs of a matrix");
ABSL_FLAG(int64_t, vocab, 0, "vocabulary size");
ABSL_FLAG(int64_t, heads, 0, "query heads; memory heads of the search");
ABSL_FLAG(int64_t, kv_heads, 0, "key heads");
ABSL_FLAG(int64_t, head_dim, 0, "width of a head");
ABSL_FLAG(int64_t, context, 0, "tokens already in the KV pages");
ABSL_FLAG(int64_t, queries, 0, "new tokens of each sequence");
ABSL_FLAG(int64_t, n_keys, 0, "half keys of one half; the table has n_keys² rows");
ABSL_FLAG(int64_t, half_dim, 0, "width of a half key");
ABSL_FLAG(int64_t, knn, 0, "rows kept per memory head");

namespace memserve::bench {
namespace {

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "memserve-bench: %s\n", message.c_str());
  std::exit(1);
}

template <typename T>
T OrFail(absl::StatusOr<T> value) {
  if (!value.ok()) Fail(std::string(value.status().message()));
  return *std::move(value);
}

struct Timing {
  double median, min, max;
};

Timing TimingOf(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
}

}  // namespace

Bench::Bench(std::string name) : name_(std::move(name)) {
  backend_ = OrFail(kernels::NewCpuBackend({.threads = absl::GetFlag(FLAGS_threads), .isa = absl::GetFlag(FLAGS_isa)}));
  for (const std::string& text : absl::GetFlag(FLAGS_batch)) {
    int64_t batch = 0;
    if (!absl::SimpleAtoi(text, &batch) || batch < 1) Fail("--batch is '" + text + "'; it must be a list of positive numbers");
    batches_.push_back(batch);
  }
  if (absl::GetFlag(FLAGS_repeat) < 1) Fail("--repeat must be at least 1");
  limits_ = MeasureLimits(backend_->threads());
  if (absl::GetFlag(FLAGS_json)) return;
  std::printf("%s, %d threads: reads %.1f GB/s in sequence, %.0f GFLOP/s of float32 multiply-adds\n", backend_->isa().c_str(),
              backend_->threads(), limits_.read_bytes_per_second / 1e9, limits_.flops_per_second / 1e9);
}

int64_t Bench::ColdCopies(int64_t bytes) {
  constexpr int64_t kMost = 64;
  return std::clamp<int64_t>(absl::GetFlag(FLAGS_cold_bytes) / std::max<int64_t>(bytes, 1), 1, kMost);
}

kernels::DeviceBuffer Bench::Allocate(int64_t bytes) { return OrFail(backend_->Allocate(bytes, "benchmark")); }

std::vector<float> Bench::Reals(int64_t count, float low, float high) {
  std::vector<float> values(count);
  for (float& value : values) value = low + (high - low) * static_cast<float>(random_() >> 40) * 0x1p-24f;
  return values;
}

std::vector<int32_t> Bench::Indices(int64_t count, int64_t end) {
  std::vector<int32_t> indices(count);
  for (int32_t& index : indices) index = static_cast<int32_t>(random_() % end);
  return indices;
}

std::unique_ptr<kernels::WeightMatrix> Bench::NewWeights(const kernels::WeightMatrixSpec& spec) {
  auto weights = OrFail(backend_->NewWeightMatrix(spec));
  constexpr int64_t kRows = 16 * kernels::WeightMatrix::kStoreRows;
  const std::vector<float> values = Reals(std::min(kRows, spec.n) * spec.k);
  for (int64_t group = 0; group < spec.groups; ++group) {
    for (int64_t row = 0; row < spec.n; row += kRows) {
      weights->Store(group, row, std::min(kRows, spec.n - row), values.data(), DType::kF32, spec.k);
    }
  }
  return weights;
}

std::unique_ptr<kernels::RowStore> Bench::NewTable(const kernels::RowStoreSpec& spec) {
  auto table = OrFail(backend_->NewRowStore(spec));
  constexpr int64_t kRows = 1024;
  const std::vector<float> values = Reals(kRows * spec.dim);
  for (int64_t row = 0; row < spec.rows; row += kRows) {
    table->Store(row, std::min(kRows, spec.rows - row), values.data(), DType::kF32);
  }
  return table;
}

void Bench::Report(const std::string& shape, int64_t batch, double bytes, double flops, const std::function<void(int64_t)>& prepare,
                   const std::function<void(int64_t)>& run) {
  constexpr int64_t kWarmUps = 3;
  std::vector<double> seconds;
  for (int64_t repetition = 0; repetition < absl::GetFlag(FLAGS_repeat) + kWarmUps; ++repetition) {
    prepare(repetition);
    const auto start = std::chrono::steady_clock::now();
    run(repetition);
    backend_->Wait(backend_->Record());
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    if (repetition >= kWarmUps) seconds.push_back(taken.count());
  }
  const Timing timing = TimingOf(seconds);
  const double limit = std::max(bytes / limits_.read_bytes_per_second, flops / limits_.flops_per_second);
  if (absl::GetFlag(FLAGS_json)) {
    std::printf("%s\n",
                absl::StrFormat(R"({"name": "%s", "shape": "%s", "isa": "%s", "threads": %d, "batch": %d, "median_seconds": %.9g, )"
                                R"("min_seconds": %.9g, "max_seconds": %.9g, "bytes": %.0f, "flops": %.0f, "limit_seconds": %.9g, )"
                                R"("share_of_limit": %.4f})",
                                name_, shape, backend_->isa(), backend_->threads(), batch, timing.median, timing.min, timing.max,
                                bytes, flops, limit, limit / timing.median)
                    .c_str());
  } else {
    std::printf("%s\n", absl::StrFormat("%s %s batch %d: %.1f µs (%.1f … %.1f), %.2f GB/s, %.2f GFLOP/s, %.0f %% of the limit",
                                        name_, shape, batch, timing.median * 1e6, timing.min * 1e6, timing.max * 1e6,
                                        bytes / timing.median / 1e9, flops / timing.median / 1e9, 100 * limit / timing.median)
                            .c_str());
  }
  std::fflush(stdout);
}

int64_t ShapeOf(const absl::Flag<int64_t>& flag, int64_t fallback) {
  const int64_t value = absl::GetFlag(flag);
  if (value < 0) Fail("a shape is " + std::to_string(value) + "; it must not be negative");
  return value > 0 ? value : fallback;
}

DType RowFormat() {
  const std::string format = absl::GetFlag(FLAGS_format);
  if (format == "int8") return DType::kI8;
  if (format == "int4") return DType::kI4;
  return Format();
}

DType Format() {
  const std::string format = absl::GetFlag(FLAGS_format);
  if (format == "f32") return DType::kF32;
  if (format == "bf16") return DType::kBF16;
  Fail("--format is '" + format + "'; it must be f32 or bf16, of rows also int8 or int4");
}

}  // namespace memserve::bench
