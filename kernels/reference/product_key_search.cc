#include "kernels/product_key_search.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {
namespace {

// The indices of the `keep` largest scores, largest first; NaN last; ties: the lower index.
std::vector<int64_t> Largest(const std::vector<float>& score, int64_t keep) {
  std::vector<int64_t> order(score.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&score](int64_t a, int64_t b) {
    if (std::isnan(score[a]) || std::isnan(score[b])) return !std::isnan(score[a]) && std::isnan(score[b]);
    return score[a] > score[b];
  });
  order.resize(keep);
  return order;
}

// half_score[t,h,s,·]
std::vector<float> HalfScores(const ProductKeySearchArgs& args, int64_t t, int64_t h, int64_t s) {
  const ReferenceWeightMatrix& half_keys = Ours(args.half_keys);
  std::vector<float> half_score(half_keys.spec().n);
  for (int64_t i = 0; i < half_keys.spec().n; ++i) {
    double sum = 0;
    for (int64_t d = 0; d < half_keys.spec().k; ++d) {
      sum += double{RoundTo(half_keys.spec().activation, args.query(t, h, s, d))} *
             half_keys.At(2 * h + s, i, d);
    }
    half_score[i] = sum;
  }
  return half_score;
}

// weight[t,h,·] of the scores kept, which are sorted.
std::vector<double> Softmax(const std::vector<float>& score) {
  std::vector<double> weight(score.size());
  double total = 0;
  for (size_t r = 0; r < score.size(); ++r) total += weight[r] = std::exp(double{score[r]} - score[0]);
  for (double& w : weight) w /= total;
  return weight;
}

void Search(const ProductKeySearchArgs& args, int64_t t, int64_t h, int64_t knn) {
  const std::vector<float> half_score[2] = {HalfScores(args, t, h, 0), HalfScores(args, t, h, 1)};
  const std::vector<int64_t> best[2] = {Largest(half_score[0], knn), Largest(half_score[1], knn)};
  std::vector<float> sum;  // [knn × knn], by rank in best[0], then rank in best[1]
  for (int64_t i : best[0]) {
    for (int64_t j : best[1]) sum.push_back(half_score[0][i] + half_score[1][j]);
  }
  const std::vector<int64_t> kept = Largest(sum, knn);
  std::vector<float> score;
  for (int64_t pair : kept) score.push_back(sum[pair]);
  const std::vector<double> weight = Softmax(score);

  for (int64_t r = 0; r < args.rows.dim(2); ++r) {
    const bool in = r < knn;
    args.scores(t, h, r) = in ? score[r] : 0;
    args.weights(t, h, r) = in ? weight[r] : 0;
    args.rows(t, h, r) = in ? best[0][kept[r] / knn] * args.half_keys->spec().n + best[1][kept[r] % knn] : -1;
  }
}

}  // namespace

void ProductKeySearch(const ProductKeySearchArgs& args) {
  const WeightMatrixSpec& half_keys = args.half_keys->spec();
  const int64_t num_tokens = args.query.dim(0), mem_heads = args.query.dim(1), knn = args.rows.dim(2);
  MEMSERVE_CHECK_EQ(args.query.dim(2), 2);
  MEMSERVE_CHECK_EQ(args.query.dim(3), half_keys.k);
  MEMSERVE_CHECK_EQ(half_keys.groups, mem_heads * 2);
  MEMSERVE_CHECK(1 <= knn && knn <= half_keys.n && half_keys.n <= 46340);
  MEMSERVE_CHECK_EQ(args.rows.dim(0), num_tokens);
  MEMSERVE_CHECK_EQ(args.rows.dim(1), mem_heads);
  MEMSERVE_CHECK(args.scores.shape == args.rows.shape);
  MEMSERVE_CHECK(args.weights.shape == args.rows.shape);
  if (args.knn_of_token) MEMSERVE_CHECK_EQ(args.knn_of_token.dim(0), num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t knn_of_token = args.knn_of_token ? args.knn_of_token(t) : knn;
    MEMSERVE_CHECK(0 <= knn_of_token && knn_of_token <= knn);
    for (int64_t h = 0; h < mem_heads; ++h) Search(args, t, h, knn_of_token);
  }
}

}  // namespace memserve::kernels::reference
