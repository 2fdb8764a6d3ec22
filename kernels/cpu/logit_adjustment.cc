#include "kernels/logit_adjustment.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/functions.h"

namespace memserve::kernels::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

float NanIsLowest(float logit) { return logit == logit ? logit : kLowest; }

void CutTypicalP(const LogitAdjustment& a, float most, float* row, int64_t n) {
  std::vector<double> p(n);
  double total = 0;
  for (int64_t id = 0; id < n; ++id) total += p[id] = std::exp((double{row[id]} - most) / a.temperature);
  double entropy = 0;
  for (double& value : p) {
    value /= total;
    if (value > 0) entropy -= value * std::log(value);
  }
  // Tokens without mass come last, and the list ends before them.
  std::vector<std::pair<double, int32_t>> by_surprise;
  for (int64_t id = 0; id < n; ++id) {
    if (p[id] > 0) by_surprise.emplace_back(std::abs(-std::log(p[id]) - entropy), static_cast<int32_t>(id));
  }
  std::sort(by_surprise.begin(), by_surprise.end());
  std::vector<bool> kept(n, false);
  double mass = 0;
  for (const auto& [surprise, id] : by_surprise) {
    if (mass >= a.typical_p) break;
    kept[id] = true;
    mass += p[id];
  }
  for (int64_t id = 0; id < n; ++id) {
    if (!kept[id]) row[id] = kLowest;
  }
}

void AdjustRow(const AdjustLogitsArgs& args, const LogitAdjustment& a, const float* logits, float* row, int64_t n) {
  for (int64_t id = 0; id < n; ++id) row[id] = NanIsLowest(logits[id]);
  for (int32_t i = a.seen_begin; i < a.seen_end; ++i) {
    const int32_t token = args.seen_tokens(i);
    MEMSERVE_CHECK(0 <= token && token < n);
    float& logit = row[token];
    if (a.repetition_penalty != 1) logit = logit > 0 ? logit / a.repetition_penalty : logit * a.repetition_penalty;
    const int32_t count = args.seen_counts(i);
    if (count > 0) logit -= a.frequency_penalty * static_cast<float>(count) + a.presence_penalty;
  }
  for (int32_t i = a.bias_begin; i < a.bias_end; ++i) {
    const int32_t token = args.bias_tokens(i);
    MEMSERVE_CHECK(0 <= token && token < n);
    row[token] = NanIsLowest(row[token] + args.bias_values(i));
  }
  if (a.mask_row >= 0) {
    const uint32_t* words = args.masks.data + a.mask_row * args.masks.dim(1);
    for (int64_t id = 0; id < n; ++id) row[id] = words[id / 32] >> (id % 32) & 1 ? row[id] : kLowest;
  }
  if (!(a.temperature > 0)) return;
  const float most = *std::max_element(row, row + n);
  if (!std::isfinite(most)) return;
  if (a.min_p > 0) {
    const double least = most + double{a.temperature} * std::log(double{a.min_p});
    for (int64_t id = 0; id < n; ++id) row[id] = row[id] < least ? kLowest : row[id];
  }
  if (a.typical_p < 1) CutTypicalP(a, most, row, n);
}

}  // namespace

void AdjustLogits(Context& context, const AdjustLogitsArgs& args) {
  const int64_t slots = args.logits.dim(0), n = args.logits.dim(1);
  context.pool.ParallelFor(slots, slots * n * 1.0, [&](int64_t s, int) {
    AdjustRow(args, args.adjustments(s), args.logits.data + s * n, args.out.data + s * n, n);
  });
}

}  // namespace memserve::kernels::cpu
