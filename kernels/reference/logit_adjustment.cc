#include "kernels/logit_adjustment.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// softmax(row / temperature).
std::vector<double> Probabilities(const std::vector<float>& row, float temperature) {
  const double largest = *std::max_element(row.begin(), row.end());
  std::vector<double> p;
  for (float logit : row) p.push_back(std::exp((logit - largest) / temperature));
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& value : p) value /= total;
  return p;
}

void CutMinP(float min_p, float temperature, std::vector<float>& row) {
  const std::vector<double> p = Probabilities(row, temperature);
  const double most = *std::max_element(p.begin(), p.end());
  for (size_t id = 0; id < row.size(); ++id) {
    if (p[id] < min_p * most) row[id] = kLowest;
  }
}

void CutTypicalP(float typical_p, float temperature, std::vector<float>& row) {
  const std::vector<double> p = Probabilities(row, temperature);
  double entropy = 0;
  for (double value : p) entropy -= value > 0 ? value * std::log(value) : 0;
  std::vector<int32_t> order(row.size());
  std::iota(order.begin(), order.end(), 0);
  const auto surprise = [&](int32_t id) { return p[id] > 0 ? std::abs(-std::log(p[id]) - entropy) : std::numeric_limits<double>::infinity(); };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return surprise(a) < surprise(b); });
  double mass = 0;
  for (int32_t id : order) {
    if (mass >= typical_p) row[id] = kLowest;
    mass += p[id];
  }
}

std::vector<float> Adjusted(const AdjustLogitsArgs& args, int64_t s) {
  const LogitAdjustment& a = args.adjustments(s);
  std::vector<float> row;
  for (int64_t id = 0; id < args.logits.dim(1); ++id) row.push_back(std::isnan(args.logits(s, id)) ? kLowest : args.logits(s, id));
  for (int32_t i = a.seen_begin; i < a.seen_end; ++i) {
    float& logit = row.at(args.seen_tokens(i));
    if (a.repetition_penalty != 1) logit = logit > 0 ? logit / a.repetition_penalty : logit * a.repetition_penalty;
    const int32_t count = args.seen_counts(i);
    if (count > 0) logit -= a.frequency_penalty * static_cast<float>(count) + a.presence_penalty;
  }
  for (int32_t i = a.bias_begin; i < a.bias_end; ++i) {
    float& logit = row.at(args.bias_tokens(i));
    logit += args.bias_values(i);
    if (std::isnan(logit)) logit = kLowest;
  }
  for (int64_t id = 0; a.mask_row >= 0 && id < args.logits.dim(1); ++id) {
    if ((args.masks(a.mask_row, id / 32) >> (id % 32) & 1) == 0) row[id] = kLowest;
  }
  if (a.temperature > 0 && std::isfinite(*std::max_element(row.begin(), row.end()))) {
    if (a.min_p > 0) CutMinP(a.min_p, a.temperature, row);
    if (a.typical_p < 1) CutTypicalP(a.typical_p, a.temperature, row);
  }
  return row;
}

}  // namespace

void AdjustLogits(const AdjustLogitsArgs& args) {
  MEMSERVE_CHECK(args.out.shape == args.logits.shape);
  MEMSERVE_CHECK_EQ(args.adjustments.dim(0), args.logits.dim(0));
  for (int64_t s = 0; s < args.logits.dim(0); ++s) {
    const std::vector<float> row = Adjusted(args, s);
    std::copy(row.begin(), row.end(), args.out.data + s * args.logits.dim(1));
  }
}

void TopLogprobs(const TopLogprobsArgs& args) {
  const int64_t slots = args.logits.dim(0), vocab_size = args.logits.dim(1), most = args.tokens.dim(1);
  MEMSERVE_CHECK_EQ(args.counts.dim(0), slots);
  MEMSERVE_CHECK(args.tokens.shape == args.logprobs.shape && args.tokens.dim(0) == slots);
  MEMSERVE_CHECK(args.chosen.size() == 0 || (args.chosen.dim(0) == slots && args.chosen_logprobs.shape == args.chosen.shape));
  for (int64_t s = 0; s < slots; ++s) {
    std::vector<double> row;
    for (int64_t id = 0; id < vocab_size; ++id) row.push_back(std::isnan(args.logits(s, id)) ? kLowest : args.logits(s, id));
    std::vector<int32_t> order(vocab_size);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
    double total = 0;
    for (double logit : row) total += std::exp(logit - row[order[0]]);
    MEMSERVE_CHECK(0 <= args.counts(s) && args.counts(s) <= std::min(most, vocab_size));
    for (int64_t r = 0; r < most; ++r) {
      const bool wanted = r < args.counts(s);
      args.tokens(s, r) = wanted ? order[r] : -1;
      args.logprobs(s, r) = wanted ? row[order[r]] - row[order[0]] - std::log(total) : 0;
    }
    for (int64_t c = 0; c < args.chosen.dim(1); ++c) {
      const int32_t token = args.chosen(s, c);
      MEMSERVE_CHECK(-1 <= token && token < vocab_size);
      args.chosen_logprobs(s, c) = token >= 0 ? row[token] - row[order[0]] - std::log(total) : 0;
    }
  }
}

}  // namespace memserve::kernels::reference
