#include "kernels/product_key_search.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int64_t mem_heads = 1;
  int64_t n_keys = 4;
  int64_t half_dim = 1;
  int64_t knn = 2;
  DType dtype = DType::kF32;
  DType activation = DType::kF32;
};

void PrintTo(const Shape& shape, std::ostream* out) {
  *out << "mem_heads " << shape.mem_heads << ", n_keys " << shape.n_keys << ", half_dim " << shape.half_dim << ", knn " << shape.knn
       << ", " << NameOf(shape.dtype) << " keys, " << NameOf(shape.activation) << " queries";
}

struct Result {
  std::vector<float> scores;
  std::vector<float> weights;
  std::vector<int32_t> rows;
};

// [num_tokens, mem_heads, knn] of each, for as many tokens as there are queries.
Result Search(Backend& backend, const Shape& shape, const WeightMatrix& half_keys, const std::vector<float>& query,
              const std::vector<int32_t>& knn_of_token = {}) {
  const int64_t num_tokens = query.size() / (shape.mem_heads * 2 * shape.half_dim);
  const DeviceTensor<float, 4> device_query(backend, {num_tokens, shape.mem_heads, 2, shape.half_dim}, query);
  const DeviceTensor<int32_t, 1> device_knn(backend, {static_cast<int64_t>(knn_of_token.size())}, knn_of_token);
  const DeviceTensor<float, 3> scores(backend, {num_tokens, shape.mem_heads, shape.knn});
  const DeviceTensor<float, 3> weights(backend, {num_tokens, shape.mem_heads, shape.knn});
  const DeviceTensor<int32_t, 3> rows(backend, {num_tokens, shape.mem_heads, shape.knn});
  ProductKeySearchArgs args{.query = device_query, .half_keys = &half_keys, .scores = scores, .weights = weights, .rows = rows};
  if (!knn_of_token.empty()) args.knn_of_token = device_knn;
  backend.ProductKeySearch(args);
  return {scores.Read(), weights.Read(), rows.Read()};
}

std::unique_ptr<WeightMatrix> NewHalfKeys(Backend& backend, const Shape& shape, const std::vector<float>& values) {
  return NewWeights(
      backend,
      {.groups = shape.mem_heads * 2, .n = shape.n_keys, .k = shape.half_dim, .dtype = shape.dtype, .activation = shape.activation},
      values);
}

// --- an expectation of its own: sorts all knn × knn sums of two fully sorted halves

struct Ranked {
  float score;
  int64_t index;
};

std::vector<Ranked> Best(const std::vector<float>& scores, int64_t knn) {
  std::vector<Ranked> ranked;
  for (size_t i = 0; i < scores.size(); ++i) ranked.push_back({scores[i], static_cast<int64_t>(i)});
  const auto before = [](float a, float b) { return std::isnan(b) ? !std::isnan(a) : a > b; };
  std::stable_sort(ranked.begin(), ranked.end(), [&](const Ranked& a, const Ranked& b) { return before(a.score, b.score); });
  ranked.resize(knn);
  return ranked;
}

Result Expected(const Shape& shape, const std::vector<float>& keys, const std::vector<float>& queries) {
  const std::vector<float> half_keys = RoundedTo(shape.dtype, keys), query = RoundedTo(shape.activation, queries);
  const int64_t heads = query.size() / (2 * shape.half_dim);  // tokens × mem_heads
  Result result;
  for (int64_t th = 0; th < heads; ++th) {
    std::vector<Ranked> best[2];
    for (int64_t s : {0, 1}) {
      const float* q = &query[(th * 2 + s) * shape.half_dim];
      const float* key = &half_keys[(th % shape.mem_heads * 2 + s) * shape.n_keys * shape.half_dim];
      std::vector<float> half_score(shape.n_keys);
      for (int64_t i = 0; i < shape.n_keys; ++i) {
        for (int64_t d = 0; d < shape.half_dim; ++d) half_score[i] = std::fma(q[d], key[i * shape.half_dim + d], half_score[i]);
      }
      best[s] = Best(half_score, shape.knn);
    }
    std::vector<float> sums;
    for (const Ranked& i : best[0]) {
      for (const Ranked& j : best[1]) sums.push_back(i.score + j.score);
    }
    double total = 0;
    const std::vector<Ranked> kept = Best(sums, shape.knn);
    for (const Ranked& pair : kept) total += std::exp(double{pair.score} - kept[0].score);
    for (const Ranked& pair : kept) {
      result.scores.push_back(pair.score);
      result.weights.push_back(std::exp(double{pair.score} - kept[0].score) / total);
      result.rows.push_back(best[0][pair.index / shape.knn].index * shape.n_keys + best[1][pair.index % shape.knn].index);
    }
  }
  return result;
}

std::vector<Shape> Shapes() {
  std::vector<Shape> shapes;
  for (int64_t n_keys : {1, 2, 15, 16, 17, 64, 100, 257}) {
    for (int64_t knn :
         {int64_t{1}, int64_t{2}, int64_t{5}, int64_t{8}, int64_t{16}, int64_t{31}, int64_t{32}, int64_t{33}, n_keys}) {
      if (knn <= n_keys && knn <= 100) shapes.push_back({.n_keys = n_keys, .half_dim = 3, .knn = knn});
    }
  }
  for (int64_t half_dim : {1, 3, 8, 20, 32, 64, 128}) {
    for (auto [dtype, activation] :
         {std::pair{DType::kF32, DType::kF32}, {DType::kBF16, DType::kF32}, {DType::kBF16, DType::kBF16}}) {
      shapes.push_back({.mem_heads = 3, .n_keys = 50, .half_dim = half_dim, .knn = 8, .dtype = dtype, .activation = activation});
    }
  }
  shapes.push_back({.mem_heads = 4, .n_keys = 256, .half_dim = 16, .knn = 32});
  return shapes;
}

class ProductKeySearchTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(ProductKeySearchTest);

TEST_P(ProductKeySearchTest, FindsTheBestPairsOfHalfKeys) {
  // Half scores: (10, 40, 20) and (1, 5, 3). Best sums: 40 + 5, 40 + 3, 20 + 5.
  const Shape shape{.n_keys = 3, .half_dim = 1, .knn = 3};
  const auto half_keys = NewHalfKeys(backend(), shape, {10, 40, 20, 1, 5, 3});
  const Result result = Search(backend(), shape, *half_keys, {1, 1});
  EXPECT_EQ(result.scores, (std::vector<float>{45, 43, 41}));  // 40 + 1 comes before nothing else: 25 is less
  EXPECT_EQ(result.rows, (std::vector<int32_t>{1 * 3 + 1, 1 * 3 + 2, 1 * 3 + 0}));
  const double total = 1 + std::exp(-2.0) + std::exp(-4.0);
  EXPECT_TRUE(NearRelative(
      result.weights,
      {static_cast<float>(1 / total), static_cast<float>(std::exp(-2.0) / total), static_cast<float>(std::exp(-4.0) / total)}, 16,
      {3}));
}

TEST_P(ProductKeySearchTest, KeepsEachMemoryHeadToItsOwnKeys) {
  const Shape shape{.mem_heads = 2, .n_keys = 2, .half_dim = 2, .knn = 1};
  const auto half_keys = NewHalfKeys(backend(), shape,
                                     {1, 0, 0, 1,    // head 0, half 0
                                      1, 0, 0, 1,    // head 0, half 1
                                      0, 1, 1, 0,    // head 1, half 0
                                      0, 1, 1, 0});  // head 1, half 1
  const Result result = Search(backend(), shape, *half_keys,
                               {7, 0, 0, 5,    // key 0, key 1
                                7, 0, 0, 5});  // key 1, key 0
  EXPECT_EQ(result.rows, (std::vector<int32_t>{0 * 2 + 1, 1 * 2 + 0}));
  EXPECT_EQ(result.scores, (std::vector<float>{12, 12}));
  EXPECT_EQ(result.weights, (std::vector<float>{1, 1}));
}

TEST_P(ProductKeySearchTest, PrefersTheLowerIndexAmongEqualHalfScores) {
  const Shape shape{.n_keys = 40, .half_dim = 1, .knn = 4};
  const auto half_keys = NewHalfKeys(backend(), shape, std::vector<float>(80, 1.0f));
  const Result result = Search(backend(), shape, *half_keys, {1, 1});
  // All scores equal: ranks are indices, pairs by rank i, then rank j.
  EXPECT_EQ(result.rows, (std::vector<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(result.weights, (std::vector<float>{0.25, 0.25, 0.25, 0.25}));
}

TEST_P(ProductKeySearchTest, BreaksTiesAmongSumsByRankAndNotByRow) {
  // Half 0: key 1 scores 3, key 0 scores 2. Half 1: key 1 scores 2, key 0 scores 1. Sums 5, then 4 twice: (rank 0, rank 1), a key
  // pair (1, 0) of row 2, before (rank 1, rank 0), a key pair (0, 1) of row 1.
  const Shape shape{.n_keys = 2, .half_dim = 1, .knn = 2};
  const auto half_keys = NewHalfKeys(backend(), shape, {2, 3, 1, 2});
  EXPECT_EQ(Search(backend(), shape, *half_keys, {1, 1}).rows, (std::vector<int32_t>{3, 2}));
}

TEST_P(ProductKeySearchTest, IsExactOnSmallIntegersFullOfTies) {
  for (const Shape& shape : Shapes()) {
    const std::vector<float> keys = Integers(1, shape.mem_heads * 2 * shape.n_keys * shape.half_dim, -2, 2);
    const auto half_keys = NewHalfKeys(backend(), shape, keys);
    for (int64_t num_tokens : {0, 1, 3}) {
      const std::vector<float> query = Integers(2, num_tokens * shape.mem_heads * 2 * shape.half_dim, -2, 2);
      const Result actual = Search(backend(), shape, *half_keys, query), expected = Expected(shape, keys, query);
      EXPECT_EQ(actual.rows, expected.rows) << testing::PrintToString(shape) << ", " << num_tokens << " tokens";
      EXPECT_TRUE(SameBits(actual.scores, expected.scores, {num_tokens, shape.mem_heads, shape.knn}))
          << testing::PrintToString(shape);
      EXPECT_TRUE(NearRelative(actual.weights, expected.weights, shape.knn + 16, {num_tokens, shape.mem_heads, shape.knn}));
    }
  }
}

// Half scores are one chain of fused multiply-adds, so rows and scores are known bit for bit; the reference sums in double and
// may swap what is nearly equal.
TEST_P(ProductKeySearchTest, FindsTheSameRowsAndBitsOnRealInputs) {
  for (const Shape& shape : Shapes()) {
    const std::vector<float> keys = Reals(1, shape.mem_heads * 2 * shape.n_keys * shape.half_dim);
    const auto half_keys = NewHalfKeys(backend(), shape, keys);
    for (int64_t num_tokens : {1, 2, 7, 33}) {
      const std::vector<float> query = Reals(2, num_tokens * shape.mem_heads * 2 * shape.half_dim, -2, 2);
      const Result actual = Search(backend(), shape, *half_keys, query), expected = Expected(shape, keys, query);
      const std::vector<int64_t> tensor = {num_tokens, shape.mem_heads, shape.knn};
      const double tolerance = (shape.half_dim + 1) * kEpsilon * 2 * shape.half_dim * 2;  // terms × epsilon × Σ|q k|, both halves
      EXPECT_TRUE(Near(actual.scores, expected.scores, tolerance, tensor)) << testing::PrintToString(shape);
      EXPECT_TRUE(Near(actual.weights, expected.weights, 2 * tolerance + 32 * kEpsilon, tensor)) << testing::PrintToString(shape);
      if (is_reference()) continue;
      EXPECT_EQ(actual.rows, expected.rows) << testing::PrintToString(shape) << ", " << num_tokens << " tokens";
      EXPECT_TRUE(SameBits(actual.scores, expected.scores, tensor)) << testing::PrintToString(shape);
    }
  }
}

TEST_P(ProductKeySearchTest, ReachesTheLastRow) {
  const Shape shape{.n_keys = 33, .half_dim = 1, .knn = 1};
  std::vector<float> keys(66, 0.0f);
  keys[32] = keys[65] = 1;
  EXPECT_EQ(Search(backend(), shape, *NewHalfKeys(backend(), shape, keys), {1, 1}).rows, std::vector<int32_t>{33 * 33 - 1});
}

TEST_P(ProductKeySearchTest, ReachesTheLastRowOfTheLargestTable) {
  const Shape shape{.n_keys = 46340, .half_dim = 1, .knn = 2};
  std::vector<float> keys(2 * 46340, 0.0f);
  keys[46339] = keys[2 * 46340 - 1] = 1;
  const Result result = Search(backend(), shape, *NewHalfKeys(backend(), shape, keys), {1, 1});
  EXPECT_EQ(result.rows, (std::vector<int32_t>{46340 * 46340 - 1, 46339 * 46340}));
}

TEST_P(ProductKeySearchTest, GivesATokenTheSameBitsInEveryBatch) {
  const Shape shape{.mem_heads = 2, .n_keys = 100, .half_dim = 20, .knn = 32};
  const std::vector<float> keys = Reals(1, 4 * 100 * 20), query = Reals(2, 40 * 2 * 2 * 20);
  const auto half_keys = NewHalfKeys(backend(), shape, keys);
  const Result all = Search(backend(), shape, *half_keys, query);
  const auto other_threads =
      is_reference() ? NewReferenceBackend() : Make({"cpu", GetParam().threads == 1 ? 3 : 1, GetParam().isa});
  const auto other_keys = NewHalfKeys(*other_threads, shape, keys);
  for (int64_t count : {1, 2, 3, 8, 17, 40}) {
    for (int64_t first : {int64_t{0}, 40 - count}) {
      const std::vector<float> some(query.begin() + first * 80, query.begin() + (first + count) * 80);
      const auto part = [&](const auto& v) {
        return std::decay_t<decltype(v)>(v.begin() + first * 64, v.begin() + (first + count) * 64);
      };
      for (const Result& result : {Search(backend(), shape, *half_keys, some), Search(*other_threads, shape, *other_keys, some)}) {
        EXPECT_EQ(result.rows, part(all.rows));
        EXPECT_TRUE(SameBits(result.scores, part(all.scores), {count, 2, 32}));
        EXPECT_TRUE(SameBits(result.weights, part(all.weights), {count, 2, 32}));
      }
    }
  }
}

TEST_P(ProductKeySearchTest, KeepsFewerForATokenThatAsksSo) {
  const Shape shape{.mem_heads = 2, .n_keys = 40, .half_dim = 8, .knn = 32};
  const std::vector<float> keys = Reals(1, 4 * 40 * 8), query = Reals(2, 5 * 2 * 2 * 8);
  const auto half_keys = NewHalfKeys(backend(), shape, keys);
  const std::vector<int32_t> knn_of_token = {32, 0, 1, 7, 32};
  const Result result = Search(backend(), shape, *half_keys, query, knn_of_token);
  for (int64_t t = 0; t < 5; ++t) {
    Shape fewer = shape;
    fewer.knn = std::max(1, knn_of_token[t]);
    const Result alone = Search(backend(), fewer, *half_keys, {query.begin() + t * 32, query.begin() + (t + 1) * 32});
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t r = 0; r < 32; ++r) {
        const bool in = r < knn_of_token[t];
        const int64_t at = (t * 2 + h) * 32 + r, at_alone = h * fewer.knn + r;
        EXPECT_EQ(result.rows[at], in ? alone.rows[at_alone] : -1) << "token " << t << ", head " << h << ", rank " << r;
        EXPECT_EQ(result.scores[at], in ? alone.scores[at_alone] : 0);
        EXPECT_EQ(result.weights[at], in ? alone.weights[at_alone] : 0);
      }
    }
  }
}

TEST_P(ProductKeySearchTest, RanksNanLast) {
  const float infinity = std::numeric_limits<float>::infinity();
  const Shape shape{.n_keys = 5, .half_dim = 1, .knn = 2};
  const auto half_keys = NewHalfKeys(backend(), shape, {kNan, 1, kNan, 3, kNan, 5, kNan, 4, kNan, kNan});
  const Result result = Search(backend(), shape, *half_keys, {1, 1});
  EXPECT_EQ(result.rows, (std::vector<int32_t>{3 * 5 + 0, 3 * 5 + 2}));  // 3 + 5, 3 + 4
  EXPECT_EQ(result.scores, (std::vector<float>{8, 7}));
  // Behind −inf too; and where nothing else is left, rows are still rows.
  const auto lowest = NewHalfKeys(backend(), {.n_keys = 3, .half_dim = 1, .knn = 3}, {kNan, -infinity, 2, 1, 2, 3});
  const Result all = Search(backend(), {.n_keys = 3, .half_dim = 1, .knn = 3}, *lowest, {1, 1});
  EXPECT_EQ(all.rows, (std::vector<int32_t>{2 * 3 + 2, 2 * 3 + 1, 2 * 3 + 0}));
  const auto nothing = NewHalfKeys(backend(), shape, std::vector<float>(10, kNan));
  EXPECT_EQ(Search(backend(), shape, *nothing, {1, 1}).rows, (std::vector<int32_t>{0, 1}));
}

TEST_P(ProductKeySearchTest, RoundsQueriesToTheActivationTypeOfTheKeys) {
  const float x = 1 + 0x1p-8f + 0x1p-20f;  // to 1 + 2^-7 in bf16
  for (DType activation : {DType::kF32, DType::kBF16}) {
    const Shape shape{.n_keys = 1, .half_dim = 1, .knn = 1, .dtype = DType::kBF16, .activation = activation};
    const Result result = Search(backend(), shape, *NewHalfKeys(backend(), shape, {1, 0}), {x, 0});
    EXPECT_EQ(result.scores[0], activation == DType::kF32 ? x : 1 + 0x1p-7f);
  }
}

}  // namespace
}  // namespace memserve::kernels
