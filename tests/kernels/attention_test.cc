#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

struct Shape {
  DType dtype = DType::kF32;
  int64_t page_size = 16;
  int64_t head_dim = 8;
  int64_t heads = 4;
  int64_t kv_heads = 2;
  int64_t queries_per_kv = 2;
  int64_t first_query_head = 0;
  int64_t first_kv_head = 0;
  int64_t window = 0;
  float scale = 0.35f;
};

void PrintTo(const Shape& shape, std::ostream* out) {
  *out << NameOf(shape.dtype) << ", page_size " << shape.page_size << ", head_dim " << shape.head_dim << ", heads " << shape.heads
       << ", kv_heads " << shape.kv_heads << ", window " << shape.window;
}

// Some sequences, all positions of each: tokens lie one sequence after the other.
struct Problem {
  Shape shape;
  std::vector<int64_t> lengths;
  std::vector<float> q;     // [num_tokens, heads, head_dim]
  std::vector<float> k, v;  // [num_tokens, kv_heads, head_dim]

  int64_t num_tokens() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }
};

Problem RandomProblem(const Shape& shape, std::vector<int64_t> lengths, float size = 1) {
  Problem problem{shape, std::move(lengths)};
  problem.q = Reals(1, problem.num_tokens() * shape.heads * shape.head_dim, -size, size);
  problem.k = Reals(2, problem.num_tokens() * shape.kv_heads * shape.head_dim, -size, size);
  problem.v = Reals(3, problem.num_tokens() * shape.kv_heads * shape.head_dim);
  return problem;
}

std::vector<int64_t> AllTokens(const Problem& problem) {
  std::vector<int64_t> tokens(problem.num_tokens());
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

// The keys and values of a problem in the pages of a back end; a different `order` puts the pages elsewhere.
class Cache {
 public:
  Cache(Backend& backend, const Problem& problem, int order = 0, bool used_before = false)
      : backend_(backend), problem_(problem), shape_(problem.shape) {
    for (int64_t length : problem.lengths) most_pages_ = std::max(most_pages_, (length + shape_.page_size - 1) / shape_.page_size);
    const int64_t sequences = problem.lengths.size();
    pages_ = {.dtype = shape_.dtype,
              .num_pages = sequences * most_pages_ + 2,
              .page_size = shape_.page_size,
              .kv_heads = shape_.kv_heads,
              .head_dim = shape_.head_dim};
    keys_ = *backend.Allocate(pages_.bytes_each(), "test");
    values_ = *backend.Allocate(pages_.bytes_each(), "test");
    pages_.keys = keys_.address();
    pages_.values = values_.address();

    std::vector<int32_t> free(pages_.num_pages);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), std::mt19937(order));
    for (int64_t s = 0; s < sequences; ++s) {
      for (int64_t p = 0; p < problem.lengths[s]; ++p) {
        sequence_.push_back(s);
        positions_.push_back(p);
      }
      for (int64_t page = 0; page < most_pages_; ++page) {
        const bool used = page * shape_.page_size < problem.lengths[s];
        block_tables_.push_back(used ? free.back() : -1);
        if (used) free.pop_back();
      }
    }
    if (used_before) FillWithNan();
    Write(0, problem.num_tokens());
  }

  // Attends with these tokens of the problem.
  std::vector<float> Attend(const std::vector<int64_t>& tokens) const {
    const int64_t num_tokens = tokens.size(), width = shape_.heads * shape_.head_dim;
    std::vector<float> q;
    std::vector<int32_t> sequence, positions;
    for (int64_t t : tokens) {
      q.insert(q.end(), problem_.q.begin() + t * width, problem_.q.begin() + (t + 1) * width);
      sequence.push_back(sequence_[t]);
      positions.push_back(positions_[t]);
    }
    const DeviceTensor<float, 3> device_q(backend_, {num_tokens, shape_.heads, shape_.head_dim}, q);
    const DeviceTensor<int32_t, 1> device_sequence(backend_, {num_tokens}, sequence),
        device_positions(backend_, {num_tokens}, positions);
    const DeviceTensor<int32_t, 2> block_tables(backend_, {static_cast<int64_t>(problem_.lengths.size()), most_pages_},
                                                block_tables_);
    const DeviceTensor<float, 3> out(backend_, {num_tokens, shape_.heads, shape_.head_dim});
    backend_.Attention({.q = device_q,
                        .sequence = device_sequence,
                        .positions = device_positions,
                        .block_tables = block_tables,
                        .pages = pages_,
                        .queries_per_kv = shape_.queries_per_kv,
                        .first_query_head = shape_.first_query_head,
                        .first_kv_head = shape_.first_kv_head,
                        .scale = shape_.scale,
                        .window = shape_.window,
                        .out = out});
    return out.Read();
  }
  std::vector<float> AttendAll() const { return Attend(AllTokens(problem_)); }

  // Copies the pages of the first sequence to pages that nobody uses, and lets it use these; what it used holds NaN from then on.
  void CopyFirstSequence() {
    std::vector<int32_t> copies, free;
    for (int32_t page = 0; page < pages_.num_pages; ++page) {
      if (std::find(block_tables_.begin(), block_tables_.end(), page) == block_tables_.end()) free.push_back(page);
    }
    std::vector<int64_t> left;
    for (int64_t p = 0; p < most_pages_ && block_tables_[p] >= 0; ++p) {
      for (int64_t i = 0; i < shape_.page_size; ++i) left.push_back(block_tables_[p] * shape_.page_size + i);
      copies.insert(copies.end(), {block_tables_[p], free.at(p)});
      block_tables_[p] = free[p];
    }
    const DeviceTensor<int32_t, 2> from_to(backend_, {static_cast<int64_t>(copies.size()) / 2, 2}, copies);
    backend_.KvCopy({.pages_from_to = from_to, .pages = pages_});
    const std::vector<float> nan(left.size() * shape_.kv_heads * shape_.head_dim, std::numeric_limits<float>::quiet_NaN());
    WriteSlots(left, nan, nan);
  }

 private:
  void Write(int64_t first, int64_t end) const {
    const int64_t width = shape_.kv_heads * shape_.head_dim;
    std::vector<int64_t> slots;
    for (int64_t t = first; t < end; ++t) {
      const int64_t page = block_tables_[sequence_[t] * most_pages_ + positions_[t] / shape_.page_size];
      slots.push_back(page * shape_.page_size + positions_[t] % shape_.page_size);
    }
    WriteSlots(slots, {problem_.k.begin() + first * width, problem_.k.begin() + end * width},
               {problem_.v.begin() + first * width, problem_.v.begin() + end * width});
  }

  void WriteSlots(const std::vector<int64_t>& slots, const std::vector<float>& k, const std::vector<float>& v) const {
    const int64_t count = slots.size();
    const DeviceTensor<float, 3> device_k(backend_, {count, shape_.kv_heads, shape_.head_dim}, k);
    const DeviceTensor<float, 3> device_v(backend_, {count, shape_.kv_heads, shape_.head_dim}, v);
    const DeviceTensor<int64_t, 1> device_slots(backend_, {count}, slots);
    backend_.KvWrite({.k = device_k, .v = device_v, .slots = device_slots, .pages = pages_});
    backend_.Wait(backend_.Record());
  }

  void FillWithNan() const {
    std::vector<int64_t> slots(pages_.num_pages * pages_.page_size);
    std::iota(slots.begin(), slots.end(), 0);
    const std::vector<float> nan(slots.size() * shape_.kv_heads * shape_.head_dim, std::numeric_limits<float>::quiet_NaN());
    WriteSlots(slots, nan, nan);
  }

  Backend& backend_;
  const Problem problem_;
  const Shape shape_;
  KvPages pages_;
  DeviceBuffer keys_, values_;
  int64_t most_pages_ = 0;
  std::vector<int32_t> sequence_, positions_;  // [num_tokens]
  std::vector<int32_t> block_tables_;          // [sequences, most_pages]
};

// Below the normal range products may be flushed to 0. Rounding moves a score by at most δ = head_dim × epsilon × Σ|q k|, hence a
// weight by the factor exp(±2δ) ≈ 1 ± 2δ.
std::vector<double> Tolerance(const Problem& problem) {
  const auto reference = NewReferenceBackend();
  Problem absolute = problem;
  absolute.v = Absolute(problem.v);
  const std::vector<float> sum_of_absolutes = Cache(*reference, absolute).AttendAll();  // Σ weight |v|
  const float largest_q =
      *std::max_element(problem.q.begin(), problem.q.end(), [](float a, float b) { return std::abs(a) < std::abs(b); });
  const float largest_k =
      *std::max_element(problem.k.begin(), problem.k.end(), [](float a, float b) { return std::abs(a) < std::abs(b); });
  const double largest_score = problem.shape.head_dim * std::abs(double{largest_q} * largest_k) * problem.shape.scale;
  const double delta = (problem.shape.head_dim + 4) * kEpsilon * largest_score;
  const double terms = 16 + *std::max_element(problem.lengths.begin(), problem.lengths.end());
  std::vector<double> tolerance;
  for (float sum : sum_of_absolutes) tolerance.push_back((2 * delta + terms * kEpsilon) * sum + std::numeric_limits<float>::min());
  return tolerance;
}

std::vector<Shape> Shapes() {
  std::vector<Shape> shapes;
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    for (int64_t head_dim : {1, 3, 8, 20, 32, 64, 128}) shapes.push_back({.dtype = dtype, .head_dim = head_dim});
    for (int64_t page_size : {16, 32, 64}) shapes.push_back({.dtype = dtype, .page_size = page_size, .head_dim = 20});
    for (int64_t window : {1, 2, 15, 16, 17, 40}) shapes.push_back({.dtype = dtype, .head_dim = 20, .window = window});
    shapes.push_back({.dtype = dtype, .heads = 1, .kv_heads = 1, .queries_per_kv = 1});
    shapes.push_back({.dtype = dtype, .heads = 8, .kv_heads = 1, .queries_per_kv = 8});
    // Heads 6 … 11 of 12, four to a key head: this rank holds key heads 1 and 2, the first for two of its queries only.
    shapes.push_back({.dtype = dtype, .heads = 6, .kv_heads = 2, .queries_per_kv = 4, .first_query_head = 6, .first_kv_head = 1});
  }
  return shapes;
}

class AttentionTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(AttentionTest);

TEST_P(AttentionTest, WeighsValuesBySoftmaxOfScores) {
  // Scores of position 1: 0 and ln 3 → weights 1/4 and 3/4.
  const Problem problem{
      {.head_dim = 1, .heads = 1, .kv_heads = 1, .queries_per_kv = 1, .scale = 0.5f}, {2}, {7, 2}, {0, std::log(3.0f)}, {8, 16}};
  EXPECT_TRUE(NearRelative(Cache(backend(), problem).AttendAll(), {8, 14}, 8, {2}));
}

TEST_P(AttentionTest, GivesEachGroupOfQueryHeadsItsKeyHead) {
  // One position: out is v of the key head. Heads 3, 4, 5 of a model with two queries to a key head, on a rank with key heads 1, 2.
  const Problem problem{{.head_dim = 1, .heads = 3, .kv_heads = 2, .queries_per_kv = 2, .first_query_head = 3, .first_kv_head = 1},
                        {1},
                        {1, 1, 1},
                        {5, 6},
                        {10, 20}};
  EXPECT_EQ(Cache(backend(), problem).AttendAll(), (std::vector<float>{10, 20, 20}));
}

TEST_P(AttentionTest, SeesTheWindowAndNothingElse) {
  // Equal keys: the mean of the values in (position − window, position].
  for (int64_t window : {0, 1, 2, 15, 16, 17, 33, 100}) {
    constexpr int64_t kLength = 70;
    Problem problem = RandomProblem({.head_dim = 1, .heads = 1, .kv_heads = 1, .queries_per_kv = 1, .window = window}, {kLength});
    std::fill(problem.k.begin(), problem.k.end(), 1.0f);
    std::vector<float> expected;
    for (int64_t t = 0; t < kLength; ++t) {
      const int64_t first = window > 0 ? std::max<int64_t>(0, t - window + 1) : 0;
      expected.push_back(std::accumulate(problem.v.begin() + first, problem.v.begin() + t + 1, 0.0) / (t + 1 - first));
    }
    EXPECT_TRUE(Near(Cache(backend(), problem).AttendAll(), expected, 100 * kEpsilon, {kLength})) << "window " << window;
  }
}

TEST_P(AttentionTest, PicksOneValueExactlyWhereItsScoreTowersAboveTheRest) {
  // Keys 0 but one: its score is 1000 above the others.
  for (int64_t chosen : {0, 1, 15, 16, 31, 32, 46}) {
    Problem problem = RandomProblem({.head_dim = 2, .heads = 1, .kv_heads = 1, .queries_per_kv = 1, .scale = 1}, {47});
    std::fill(problem.q.begin(), problem.q.end(), 10.0f);
    std::fill(problem.k.begin(), problem.k.end(), 0.0f);
    problem.k[2 * chosen] = problem.k[2 * chosen + 1] = 50;
    EXPECT_TRUE(SameBits(Cache(backend(), problem).Attend({46}), {problem.v[2 * chosen], problem.v[2 * chosen + 1]}, {2}));
  }
}

TEST_P(AttentionTest, DoesNothingWithoutTokens) { EXPECT_TRUE(Cache(backend(), RandomProblem({}, {3})).Attend({}).empty()); }

TEST_P(AttentionTest, AgreesWithTheReference) {
  const auto reference = NewReferenceBackend();
  for (const Shape& shape : Shapes()) {
    for (float size : {1.0f, 8.0f}) {  // flat and peaked softmax
      const Problem problem = RandomProblem(shape, {1, 16, 47, 33}, size);
      const Cache actual(backend(), problem), expected(*reference, problem);
      EXPECT_TRUE(
          Near(actual.AttendAll(), expected.AttendAll(), Tolerance(problem), {problem.num_tokens(), shape.heads, shape.head_dim}))
          << testing::PrintToString(shape);
    }
  }
}

TEST_P(AttentionTest, ReadsKeysAndValuesAsStored) {
  Problem problem = RandomProblem({.dtype = DType::kBF16, .head_dim = 20}, {33});
  const std::vector<float> from_floats = Cache(backend(), problem).AttendAll();
  problem.k = RoundedTo(DType::kBF16, problem.k);
  problem.v = RoundedTo(DType::kBF16, problem.v);
  EXPECT_TRUE(SameBits(from_floats, Cache(backend(), problem).AttendAll(), {33, 4, 20}));
}

// One position: out is its value as stored.
std::vector<float> AsStored(Backend& backend, const std::vector<float>& x) {
  const int64_t head_dim = static_cast<int64_t>(x.size());
  const Problem problem{{.dtype = DType::kI8, .head_dim = head_dim, .heads = 1, .kv_heads = 1, .queries_per_kv = 1},
                        {1},
                        std::vector<float>(x.size(), 1.0f),
                        std::vector<float>(x.size(), 1.0f),
                        x};
  return Cache(backend, problem).AttendAll();
}

TEST_P(AttentionTest, KeepsInt8CodesToTheNearestHalvesToEven) {
  // The largest is 127, so the scale is 1.
  EXPECT_TRUE(SameBits(AsStored(backend(), {127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 0.4999f, -126.7f, 3}),
                       {127, 0, 2, 2, 0, -2, 0, -127, 3}, {9}));
  // The scale is 2: 254 / 127. Of the other sign too.
  EXPECT_TRUE(SameBits(AsStored(backend(), {-254, 3, 5, 6.1f}), {-254, 4, 4, 6}, {4}));  // 1.5 → 2, 2.5 → 2
  EXPECT_TRUE(SameBits(AsStored(backend(), {0, 0, 0}), {0, 0, 0}, {3}));
  EXPECT_TRUE(SameBits(AsStored(backend(), {1e-37f, -1e-38f}), {0, 0}, {2})) << "the scale would not be a normal number";
  EXPECT_TRUE(NearRelative(AsStored(backend(), {3e38f, -3e38f, 1}), {3e38f, -3e38f, 0}, 8, {3}));
}

TEST_P(AttentionTest, AnInt8TokenThatIsNotFiniteIsNanAndAlone) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    for (const float value : AsStored(backend(), {1, bad, 2})) EXPECT_TRUE(std::isnan(value)) << bad;
  }
  // The token after the bad one sees it; the other sequence does not.
  Problem problem = RandomProblem({.dtype = DType::kI8, .heads = 2, .kv_heads = 1}, {2, 2});
  problem.k[8] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> out = Cache(backend(), problem).AttendAll();
  EXPECT_FALSE(std::isnan(out[0]));
  EXPECT_TRUE(std::isnan(out[16]));
  for (size_t i = 32; i < 64; ++i) EXPECT_FALSE(std::isnan(out[i])) << i;
}

TEST_P(AttentionTest, KeepsAnInt8ScalePerTokenAndHead) {
  // Tokens and heads of sizes far apart: one scale for them together would lose the small ones.
  Problem problem = RandomProblem({.dtype = DType::kI8, .head_dim = 20}, {33});
  for (size_t i = 0; i < problem.v.size(); ++i) {
    const size_t t = i / 40, head = i / 20 % 2;
    problem.v[i] *= (t % 2 == 0 ? 1.0f : 1e-3f) * (head == 0 ? 1.0f : 1e3f);
    problem.k[i] = 0;  // all weigh alike
  }
  Problem exact = problem;
  exact.shape.dtype = DType::kF32;
  const std::vector<float> stored = Cache(backend(), problem).AttendAll(), expected = Cache(backend(), exact).AttendAll();
  for (int64_t t = 0; t < 33; ++t) {
    for (int64_t i = 0; i < 80; ++i) {
      const int64_t kv = i / 40;
      double allowed = 0;  // half a code of each token's value, weighed
      for (int64_t p = 0; p <= t; ++p) {
        float largest = 0;
        for (int64_t d = 0; d < 20; ++d) largest = std::max(largest, std::abs(problem.v[p * 40 + kv * 20 + d]));
        allowed += 0.51 * largest / 127 / static_cast<double>(t + 1);
      }
      ASSERT_NEAR(stored[t * 80 + i], expected[t * 80 + i], allowed) << "token " << t << ", " << i;
    }
  }
}

TEST_P(AttentionTest, GivesATokenTheSameBitsHoweverItIsBatchedAndPaged) {
  for (const Shape& shape : Shapes()) {
    const Problem problem = RandomProblem(shape, {5, 50, 33});
    const std::vector<int64_t> tokens = AllTokens(problem);
    const int64_t width = shape.heads * shape.head_dim;
    const Cache cache(backend(), problem);
    const std::vector<float> all = cache.AttendAll();
    const auto expect_same = [&](const std::vector<float>& out, int64_t first, int64_t count, const char* how) {
      EXPECT_TRUE(
          SameBits(out, {all.begin() + first * width, all.begin() + (first + count) * width}, {count, shape.heads, shape.head_dim}))
          << how << " from token " << first << "; " << testing::PrintToString(shape);
    };
    for (int64_t t : tokens) expect_same(cache.Attend({t}), t, 1, "decoded alone");
    for (int64_t chunk : {2, 7, 16, 31}) {
      for (int64_t first = 0; first < problem.num_tokens(); first += chunk) {
        const int64_t count = std::min(chunk, problem.num_tokens() - first);
        expect_same(cache.Attend({tokens.begin() + first, tokens.begin() + first + count}), first, count, "in chunks");
      }
    }
    expect_same(Cache(backend(), problem, /*order=*/1).AttendAll(), 0, problem.num_tokens(), "pages elsewhere");
    expect_same(Cache(backend(), problem, /*order=*/0, /*used_before=*/true).AttendAll(), 0, problem.num_tokens(),
                "NaN in unused slots");
    Problem larger_pages = problem;
    larger_pages.shape.page_size *= 2;
    expect_same(Cache(backend(), larger_pages).AttendAll(), 0, problem.num_tokens(), "larger pages");
    if (is_reference()) continue;
    const auto other_threads = Make({"cpu", GetParam().threads == 1 ? 3 : 1, GetParam().isa});
    expect_same(Cache(*other_threads, problem).AttendAll(), 0, problem.num_tokens(), "other threads");
  }
}

TEST_P(AttentionTest, GivesAHeadTheSameBitsOnEveryRank) {
  for (const DType dtype : {DType::kF32, DType::kI8}) {
    const Problem whole = RandomProblem({.dtype = dtype, .head_dim = 20, .heads = 12, .kv_heads = 3, .queries_per_kv = 4}, {20});
    const std::vector<float> all = Cache(backend(), whole).AttendAll();
    const auto heads = [](const std::vector<float>& values, int64_t of, int64_t first, int64_t count) {
      std::vector<float> some;
      for (int64_t t = 0; t < 20; ++t) {
        some.insert(some.end(), values.begin() + (t * of + first) * 20, values.begin() + (t * of + first + count) * 20);
      }
      return some;
    };
    Problem rank = whole;
    rank.shape = {
        .dtype = dtype, .head_dim = 20, .heads = 6, .kv_heads = 2, .queries_per_kv = 4, .first_query_head = 6, .first_kv_head = 1};
    rank.q = heads(whole.q, 12, 6, 6);
    rank.k = heads(whole.k, 3, 1, 2);
    rank.v = heads(whole.v, 3, 1, 2);
    EXPECT_TRUE(SameBits(Cache(backend(), rank).AttendAll(), heads(all, 12, 6, 6), {20, 6, 20}));
  }
}

TEST_P(AttentionTest, CopiedPagesHoldWhatTheirOriginalsHeld) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    Shape shape;
    shape.dtype = dtype;
    const Problem problem = RandomProblem(shape, {27, 9});
    Cache cache(backend(), problem);
    const std::vector<float> before = cache.AttendAll();
    cache.CopyFirstSequence();
    EXPECT_EQ(cache.AttendAll(), before) << NameOf(dtype);
  }
}

}  // namespace
}  // namespace memserve::kernels
