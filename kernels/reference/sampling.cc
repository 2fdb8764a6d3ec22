#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/random.h"
#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {
namespace {

// logits[s, ·]; NaN counts as −inf.
std::vector<double> Row(TensorView<const float, 2> logits, int64_t s) {
  std::vector<double> row(logits.dim(1));
  for (int64_t id = 0; id < logits.dim(1); ++id) {
    const float logit = logits(s, id);
    row[id] = std::isnan(logit) ? -std::numeric_limits<double>::infinity() : logit;
  }
  return row;
}

int64_t ArgMax(const std::vector<double>& row) {
  return std::max_element(row.begin(), row.end()) - row.begin();
}

double LogSoftmax(const std::vector<double>& row, int64_t id) {
  const double largest = row[ArgMax(row)];
  double total = 0;
  for (double logit : row) total += std::exp(logit - largest);
  return row[id] - largest - std::log(total);
}

// The ids that may be drawn, in the order in which u · mass walks them.
std::vector<int64_t> Order(const std::vector<double>& row, const SamplingSlot& slot) {
  std::vector<int64_t> ids(row.size());
  std::iota(ids.begin(), ids.end(), 0);
  const bool top_k_cuts = 0 < slot.top_k && slot.top_k < static_cast<int64_t>(row.size());
  if (!top_k_cuts && slot.top_p >= 1) return ids;
  std::stable_sort(ids.begin(), ids.end(), [&row](int64_t a, int64_t b) { return row[a] > row[b]; });
  if (top_k_cuts) ids.resize(slot.top_k);
  return ids;
}

int64_t Draw(const std::vector<double>& row, const SamplingSlot& slot) {
  const double largest = row[ArgMax(row)];
  if (std::isinf(largest)) return ArgMax(row);  // no distribution: nothing but −inf, or an overflow
  std::vector<int64_t> order = Order(row, slot);
  std::vector<double> p;
  for (int64_t id : order) p.push_back(std::exp((row[id] - largest) / slot.temperature));
  double mass = std::accumulate(p.begin(), p.end(), 0.0);
  if (slot.top_p < 1) {
    size_t kept = 0;
    double prefix = 0;
    do prefix += p[kept++];
    while (kept < p.size() && prefix < slot.top_p * mass);
    p.resize(kept);
    mass = prefix;
  }
  const double target = Uniform(slot.seed, slot.choice, slot.position) * mass;
  double sum = 0;
  int64_t token = order[0];
  for (size_t i = 0; i < p.size() && sum <= target; ++i) {
    if (p[i] > 0) token = order[i];
    sum += p[i];
  }
  return token;
}

}  // namespace

void Sample(const SampleArgs& args) {
  const int64_t slots = args.logits.dim(0);
  MEMSERVE_CHECK_EQ(args.slots.dim(0), slots);
  MEMSERVE_CHECK_EQ(args.tokens.dim(0), slots);
  MEMSERVE_CHECK_EQ(args.logprobs.dim(0), slots);
  MEMSERVE_CHECK(slots == 0 || args.logits.dim(1) > 0);
  for (int64_t s = 0; s < slots; ++s) {
    const std::vector<double> row = Row(args.logits, s);
    const SamplingSlot& slot = args.slots(s);
    args.tokens(s) = slot.temperature > 0 ? Draw(row, slot) : ArgMax(row);
    args.logprobs(s) = LogSoftmax(row, args.tokens(s));
  }
}

void TokenLogprob(const TokenLogprobArgs& args) {
  const int64_t slots = args.logits.dim(0);
  MEMSERVE_CHECK_EQ(args.targets.dim(0), slots);
  MEMSERVE_CHECK_EQ(args.logprobs.dim(0), slots);
  MEMSERVE_CHECK_EQ(args.is_greedy.dim(0), slots);
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t target = args.targets(s);
    MEMSERVE_CHECK(-1 <= target && target < args.logits.dim(1));
    const std::vector<double> row = Row(args.logits, s);
    args.logprobs(s) = target < 0 ? 0 : LogSoftmax(row, target);
    args.is_greedy(s) = target >= 0 && ArgMax(row) == target;
  }
}

void SelectRows(const SelectRowsArgs& args) {
  const int64_t slots = args.rows.dim(0), dim = args.x.dim(1);
  MEMSERVE_CHECK_EQ(args.out.dim(0), slots);
  MEMSERVE_CHECK_EQ(args.out.dim(1), dim);
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t row = args.rows(s);
    MEMSERVE_CHECK(0 <= row && row < args.x.dim(0));
    for (int64_t d = 0; d < dim; ++d) args.out(s, d) = args.x(row, d);
  }
}

}  // namespace memserve::kernels::reference
