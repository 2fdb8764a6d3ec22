#include "engine/step_times.h"

#include <algorithm>
#include <cmath>

namespace memserve::engine {
namespace {

constexpr double kNoise = 0.2;        // of one measurement, as a share of it
constexpr double kDrift = 0.01;       // of a cost, from step to step, as a share of it
constexpr double kLeastCost = 1e-12;  // seconds
// A step that was held up tells little: at most so many times what was expected counts.
constexpr double kMostSurprise = 2.0;
constexpr double kWeight = 0.1;  // of one more step that only decodes

}  // namespace

StepTimes::StepTimes(absl::Duration base, absl::Duration token, absl::Duration key)
    : known_(true), cost_{absl::ToDoubleSeconds(base), absl::ToDoubleSeconds(token), absl::ToDoubleSeconds(key)} {}

void StepTimes::Add(const StepWork& work, absl::Duration duration, bool only_decodes) {
  const std::array<double, kCosts> counts = {1, static_cast<double>(work.tokens), static_cast<double>(work.keys)};
  double seconds = absl::ToDoubleSeconds(duration);
  if (work.tokens <= 0 || seconds <= 0) return;
  if (only_decodes) {
    const bool alike = work.tokens == last_decodes_.tokens;
    decode_seconds_ =
        alike ? decode_seconds_ + kWeight * (std::min(seconds, kMostSurprise * decode_seconds_) - decode_seconds_) : seconds;
    last_decodes_ = work;
  }
  if (!known_) {
    // Any part of it may be the base, or the keys'. Where most is taken for the tokens', the first chunks are rather too small.
    cost_ = {seconds * 0.2, seconds * 0.7 / counts[1], seconds * 0.1 / counts[2]};
    for (int i = 0; i < kCosts; ++i) covariance_[i][i] = cost_[i] * cost_[i];
    known_ = true;
    return;
  }
  const double expected = absl::ToDoubleSeconds(Expected(work));
  seconds = std::min(seconds, kMostSurprise * expected);

  for (int i = 0; i < kCosts; ++i) covariance_[i][i] += std::pow(kDrift * cost_[i], 2);
  std::array<double, kCosts> with_sum = {};  // covariance of each cost with the sum
  double variance = std::pow(kNoise * expected, 2);
  for (int i = 0; i < kCosts; ++i) {
    for (int j = 0; j < kCosts; ++j) with_sum[i] += covariance_[i][j] * counts[j];
    variance += counts[i] * with_sum[i];
  }
  for (int i = 0; i < kCosts; ++i) cost_[i] = std::max(kLeastCost, cost_[i] + with_sum[i] / variance * (seconds - expected));
  for (int i = 0; i < kCosts; ++i) {
    for (int j = 0; j < kCosts; ++j) covariance_[i][j] -= with_sum[i] * with_sum[j] / variance;
  }
  // What no step tells of stays as uncertain as it was at first; more would make the next measurement of it decide alone.
  for (int i = 0; i < kCosts; ++i) {
    const double most = std::pow(std::max(cost_[i], 1e-9), 2);
    if (covariance_[i][i] <= most) continue;
    const double scale = std::sqrt(most / covariance_[i][i]);
    for (int j = 0; j < kCosts; ++j) {
      covariance_[i][j] *= scale;
      covariance_[j][i] *= scale;
    }
  }
}

absl::Duration StepTimes::Expected(const StepWork& work) const {
  return absl::Seconds(cost_[0] + cost_[1] * static_cast<double>(work.tokens) + cost_[2] * static_cast<double>(work.keys));
}

// What is expected of a step that only decodes: not more than those that were seen suggest, since twice the tokens take at most
// twice as long. While prompts are computed no such step is seen, and what is the base's and what the tokens' is hard to tell
// apart.
double StepTimes::DecodeSeconds(const StepWork& decodes) const {
  const double expected = absl::ToDoubleSeconds(Expected(decodes));
  if (last_decodes_.tokens == 0) return expected;
  const double more = std::max(1.0, static_cast<double>(decodes.tokens) / static_cast<double>(last_decodes_.tokens));
  const double keys = std::max(0.0, static_cast<double>(decodes.keys) - more * static_cast<double>(last_decodes_.keys));
  return std::min(expected, more * decode_seconds_ + cost_[2] * keys);
}

int64_t StepTimes::PrefillLimit(const StepWork& decodes, const StepWork& work, int64_t position) const {
  if (!known_) return INT64_MAX;
  const double room = kLongest * DecodeSeconds(decodes) - absl::ToDoubleSeconds(Expected(work));
  if (room <= 0) return 0;
  // key / 2 · n² + (token + key · (position + 1/2)) · n = room
  const double linear = cost_[1] + cost_[2] * (static_cast<double>(position) + 0.5);
  return static_cast<int64_t>(std::min(1e9, 2 * room / (linear + std::sqrt(linear * linear + 2 * cost_[2] * room))));
}

}  // namespace memserve::engine
