// A whole checkpoint through the engine: tokens per second of --batch streams at once, and what a step takes.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <future>

#include "engine/engine.h"
#include "spdlog/spdlog.h"
#include "tests/bench/bench.h"
#include "tests/bench/operations.h"

ABSL_FLAG(std::string, checkpoint, "", "model: the checkpoint's folder");
ABSL_FLAG(int64_t, prompt, 16, "model: tokens of each prompt");
ABSL_FLAG(int64_t, decode, 128, "model: tokens drawn for each");
ABSL_FLAG(std::string, weight_dtype, "auto", "model: f32, bf16, auto");
ABSL_FLAG(int64_t, max_batch_tokens, 512, "model: tokens in one step");

ABSL_DECLARE_FLAG(int, threads);
ABSL_DECLARE_FLAG(std::string, isa);
ABSL_DECLARE_FLAG(bool, json);
ABSL_DECLARE_FLAG(int64_t, repeat);
ABSL_DECLARE_FLAG(std::vector<std::string>, batch);

namespace memserve::bench {
namespace {

class Counter final : public engine::GenerateListener {
 public:
  void OnDelta(engine::Delta delta) override {}
  void OnFinished(absl::StatusOr<engine::Finished> finished) override { promise_.set_value(std::move(finished)); }
  engine::Finished Wait() {
    absl::StatusOr<engine::Finished> finished = promise_.get_future().get();
    if (finished.ok()) return *std::move(finished);
    std::fprintf(stderr, "memserve-bench: %s\n", std::string(finished.status().message()).c_str());
    std::exit(1);
  }

 private:
  std::promise<absl::StatusOr<engine::Finished>> promise_;
};

struct Sample {
  double wall_seconds;    // of all streams
  double decode_seconds;  // of one stream, after its first token
};

Sample RunOnce(engine::Engine& engine, int64_t streams, int64_t prompt, int64_t decode) {
  std::vector<std::shared_ptr<Counter>> counters;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t s = 0; s < streams; ++s) {
    engine::GenerateRequest request;
    std::vector<int32_t> tokens;
    for (int64_t t = 0; t < prompt; ++t) tokens.push_back(static_cast<int32_t>((s * 31 + t * 7 + 3) % engine.model().vocab_size));
    request.prompt = tokens;
    request.stop = {.max_tokens = static_cast<int32_t>(decode), .ignore_eos = true};
    request.scheduling.prefix_cache = false;  // prompts are the same each time
    counters.push_back(std::make_shared<Counter>());
    engine.Generate(std::move(request), counters.back());
  }
  double decode_seconds = 0;
  for (const auto& counter : counters) decode_seconds += absl::ToDoubleSeconds(counter->Wait().timings.decode);
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - start;
  return {wall.count(), decode_seconds / static_cast<double>(streams)};
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

engine::EngineOptions OptionsOfFlags() {
  spdlog::set_level(spdlog::level::warn);
  engine::EngineOptions options;
  options.checkpoint = absl::GetFlag(FLAGS_checkpoint);
  options.weight_dtype = absl::GetFlag(FLAGS_weight_dtype);
  options.threads = absl::GetFlag(FLAGS_threads);
  options.isa = absl::GetFlag(FLAGS_isa);
  options.max_batch_tokens = static_cast<int>(absl::GetFlag(FLAGS_max_batch_tokens));
  return options;
}

std::unique_ptr<engine::Engine> Start(const engine::EngineOptions& options) {
  absl::StatusOr<std::unique_ptr<engine::Engine>> engine = engine::Engine::Create(options);
  if (engine.ok()) return *std::move(engine);
  std::fprintf(stderr, "memserve-bench: %s\n", std::string(engine.status().message()).c_str());
  std::exit(1);
}

}  // namespace

void BenchModel() {
  const std::unique_ptr<engine::Engine> engine = Start(OptionsOfFlags());
  const int64_t prompt = absl::GetFlag(FLAGS_prompt);
  const int64_t decode = absl::GetFlag(FLAGS_decode);
  for (const std::string& text : absl::GetFlag(FLAGS_batch)) {
    const int64_t streams = std::atoll(text.c_str());
    std::vector<double> wall;
    std::vector<double> decoding;
    RunOnce(*engine, streams, prompt, decode);  // warm-up
    for (int64_t i = 0; i < absl::GetFlag(FLAGS_repeat); ++i) {
      const Sample sample = RunOnce(*engine, streams, prompt, decode);
      wall.push_back(sample.wall_seconds);
      decoding.push_back(sample.decode_seconds / static_cast<double>(std::max<int64_t>(1, decode - 1)));
    }
    // The last steps are of streams that ended: enough tokens and rounds fill the window with whole batches.
    const engine::StepSummary steps = engine->load().recent;
    const double tokens_per_second = static_cast<double>(streams * decode) / Median(wall);
    if (absl::GetFlag(FLAGS_json)) {
      std::printf("%s\n",
                  absl::StrFormat(R"({"name": "model", "batch": %d, "prompt": %d, "decode": %d, "median_seconds": %.9g, )"
                                  R"("min_seconds": %.9g, "max_seconds": %.9g, "tokens_per_second": %.6g, "token_seconds": %.9g, )"
                                  R"("step_median_seconds": %.6g, "step_p99_seconds": %.6g, "schedule_share": %.5g, )"
                                  R"("forward_share": %.5g, "sample_share": %.5g, "hand_over_share": %.5g, "output_share": %.5g})",
                                  streams, prompt, decode, Median(wall), *std::min_element(wall.begin(), wall.end()),
                                  *std::max_element(wall.begin(), wall.end()), tokens_per_second, Median(decoding),
                                  steps.median_seconds, steps.p99_seconds, steps.schedule_share, steps.forward_share,
                                  steps.sample_share, steps.hand_over_share, steps.output_share)
                      .c_str());
    } else {
      std::printf("%s\n",
                  absl::StrFormat("model %s, %d streams, prompt %d, decode %d: %.0f tokens/s, %.1f µs a token of one stream "
                                  "(%.1f … %.1f)",
                                  engine->model().name, streams, prompt, decode, tokens_per_second, Median(decoding) * 1e6,
                                  *std::min_element(decoding.begin(), decoding.end()) * 1e6,
                                  *std::max_element(decoding.begin(), decoding.end()) * 1e6)
                      .c_str());
      std::printf("%s\n",
                  absl::StrFormat(
                      "  the last %d steps: median %.1f µs, p99 %.1f; schedule %.2f %%, forward %.2f %%, sample %.2f %%, "
                      "hand over %.2f %%; beside it the output thread %.2f %%",
                      steps.steps, steps.median_seconds * 1e6, steps.p99_seconds * 1e6, 100 * steps.schedule_share,
                      100 * steps.forward_share, 100 * steps.sample_share, 100 * steps.hand_over_share, 100 * steps.output_share)
                      .c_str());
    }
    std::fflush(stdout);
  }
}

// Two engines side by side, one of which counts the rows that are read, in turns; the fastest run of each tells what it takes.
// Where their memory came to lie makes a difference of some per cent, so each round has engines of its own.
void BenchCounting() {
  constexpr int kRuns = 7;
  const int64_t prompt = absl::GetFlag(FLAGS_prompt), decode = absl::GetFlag(FLAGS_decode);
  for (const std::string& text : absl::GetFlag(FLAGS_batch)) {
    const int64_t streams = std::atoll(text.c_str());
    std::vector<double> ratios, with, without;
    for (int64_t round = 0; round < absl::GetFlag(FLAGS_repeat); ++round) {
      std::unique_ptr<engine::Engine> engines[2];
      engine::EngineOptions options = OptionsOfFlags();
      for (const int64_t e : {round % 2, 1 - round % 2}) {
        options.count_rows = e == 0;
        engines[e] = Start(options);
      }
      double fastest[2] = {1e9, 1e9};
      for (int run = -1; run < kRuns; ++run) {
        for (const int e : {run & 1, 1 - (run & 1)}) {
          const double seconds = RunOnce(*engines[e], streams, prompt, decode).wall_seconds;
          if (run >= 0) fastest[e] = std::min(fastest[e], seconds);  // the first warms up
        }
      }
      with.push_back(fastest[0]);
      without.push_back(fastest[1]);
      ratios.push_back(fastest[0] / fastest[1]);
    }
    std::printf(
        "%s\n",
        absl::StrFormat("counting %s, %d streams, prompt %d, decode %d: %.3f ms with, %.3f ms without; ratio %.4f (%.4f … %.4f)",
                        absl::GetFlag(FLAGS_checkpoint), streams, prompt, decode, Median(with) * 1e3, Median(without) * 1e3,
                        Median(ratios), *std::min_element(ratios.begin(), ratios.end()),
                        *std::max_element(ratios.begin(), ratios.end()))
            .c_str());
    std::fflush(stdout);
  }
}

}  // namespace memserve::bench
