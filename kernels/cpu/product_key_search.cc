// Half scores are a panel product with lanes over keys. The knn best of many scores are found without sorting them: a threshold
// that at least knn of them reach comes from the maxima of short runs, one pass keeps what reaches it, and those few are ranked
// by counting what beats them.
#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/product_key_search.cc"
#include "kernels/cpu/foreach_target.h"
#include "kernels/cpu/functions.h"
#include "kernels/cpu/panel_product-inl.h"

#ifndef MEMSERVE_KERNELS_CPU_PRODUCT_KEY_SEARCH_CC_
#define MEMSERVE_KERNELS_CPU_PRODUCT_KEY_SEARCH_CC_
namespace memserve::kernels::cpu {

// Of NaN. Every key is one more than some other number.
inline constexpr int32_t kLowestKey = std::numeric_limits<int32_t>::min() + 1;

alignas(64) inline constexpr int32_t kFirstPlaces[kPanel] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Staircase MakeStaircase(int64_t keep) {
  Staircase stairs;
  for (int32_t i = 0; i < keep; ++i) {
    stairs.columns.push_back(static_cast<int32_t>(keep / (i + 1)));
    for (int32_t j = 0; j < stairs.columns[i]; ++j) {
      stairs.i.push_back(i);
      stairs.j.push_back(j);
    }
    if (keep % (i + 1) == 0) stairs.corners.push_back(static_cast<int32_t>(stairs.i.size() - 1));
  }
  return stairs;
}

// Made before the threads need them.
inline void EnsureStaircase(Context& context, int64_t keep) {
  if (static_cast<int64_t>(context.staircases.size()) <= keep) context.staircases.resize(keep + 1);
  if (context.staircases[keep] == nullptr) {
    context.staircases[keep] = std::make_unique<const Staircase>(MakeStaircase(keep));
  }
}

// One thread's room for choosing among up to `most` scores.
struct SelectRoom {
  SelectRoom(Scratch& scratch, int64_t most, int64_t knn, int64_t score_floats) {
    const int64_t room = most + 2 * kPanel, best_room = knn + 2 * kPanel;
    float* next = scratch.Get<float>(6 * room + 5 * best_room + score_floats);
    const auto take = [&next](auto*& to, int64_t count) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(next);
      next += count;
    };
    take(scores, score_floats);
    take(sums, room);
    take(keys, room);
    take(candidate_keys, room);
    take(candidates, room);
    take(ranks, room);
    take(order, room);
    for (int s = 0; s < 2; ++s) {
      take(best[s], best_room);
      take(best_score[s], best_room);
    }
  }

  float* scores;
  float* sums;
  int32_t* keys;            // order-preserving: a larger score has the larger key
  int32_t* candidate_keys;  // of those that reach the threshold,
  int32_t* candidates;      // and where they were
  int32_t* ranks;
  int32_t* order;  // what was chosen, best first
  int32_t* best[2];
  float* best_score[2];
};

}  // namespace memserve::kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace memserve::kernels::cpu::HWY_NAMESPACE {

// Integer code may take registers as they come: choosing is exact.
constexpr int64_t RoundUp(int64_t n) { return (n + kPart - 1) / kPart * kPart; }

// at, at + 1, …
HWY_INLINE IntVec PlacesFrom(int64_t at) {
  return hn::Add(hn::Load(IntTag(), kFirstPlaces), hn::Set(IntTag(), static_cast<int32_t>(at)));
}

// Equal scores get equal keys (−0 becomes 0), NaN the lowest. Fills up to whole vectors with the lowest.
void MakeKeys(const float* scores, int64_t n, int32_t* keys) {
  const FloatTag f;
  const IntTag i;
  for (int64_t at = 0; at < n; at += kPart) {
    const FloatVec score = hn::Add(hn::LoadU(f, scores + at), hn::Zero(f));
    const IntVec bits = hn::BitCast(i, score);
    const IntVec key = hn::Xor(bits, hn::And(hn::ShiftRight<31>(bits), hn::Set(i, 0x7fffffff)));
    hn::StoreU(hn::IfThenElse(hn::RebindMask(i, hn::Eq(score, score)), key, hn::Set(i, kLowestKey)), i, keys + at);
  }
  std::fill(keys + n, keys + RoundUp(n), kLowestKey);
}

constexpr int64_t kMostRanked = 512;  // counting is quadratic

// ranks[c] = how many beat c: larger keys, and equal ones before it.
void Rank(const int32_t* keys, int64_t count, int32_t* ranks) {
  const IntTag tag;
  const IntVec one = hn::Set(tag, 1);
  for (int64_t at = 0; at < count; at += kPart) {
    const IntVec key = hn::LoadU(tag, keys + at), place = PlacesFrom(at);
    const IntVec less = hn::Sub(key, one);
    const int64_t end = std::min(at + kPart, count);
    IntVec rank = hn::Zero(tag);
    const auto beat = [&](int64_t c, IntVec what)
                          HWY_ATTR { rank = hn::IfThenElse(hn::Gt(hn::Set(tag, keys[c]), what), hn::Add(rank, one), rank); };
    for (int64_t c = 0; c < at; ++c) beat(c, less);
    for (int64_t c = at; c < end; ++c) {
      beat(c, hn::IfThenElse(hn::Gt(place, hn::Set(tag, static_cast<int32_t>(c))), less, key));
    }
    for (int64_t c = end; c < count; ++c) beat(c, key);
    hn::StoreU(rank, tag, ranks + at);
  }
}

// order[0 .. keep) = the candidates with the largest keys, largest first, earlier ones first among equals.
void OrderCandidates(SelectRoom& room, int64_t count, int64_t keep) {
  if (count <= kMostRanked) {
    Rank(room.candidate_keys, count, room.ranks);
    for (int64_t c = 0; c < count; ++c) room.order[room.ranks[c]] = room.candidates[c];
    return;
  }
  const auto before = [&](int32_t a, int32_t b) {
    return room.candidate_keys[a] != room.candidate_keys[b] ? room.candidate_keys[a] > room.candidate_keys[b] : a < b;
  };
  for (int32_t c = 0; c < count; ++c) room.order[c] = c;
  std::nth_element(room.order, room.order + keep - 1, room.order + count, before);
  std::sort(room.order, room.order + keep, before);
  for (int64_t r = 0; r < keep; ++r) room.order[r] = room.candidates[room.order[r]];
}

// Candidates = those of keys[0 .. n) that reach the threshold, in order.
int64_t Filter(SelectRoom& room, int64_t n, int32_t threshold) {
  const IntTag tag;
  const IntVec below = hn::Set(tag, threshold - 1);
  int64_t count = 0;
  for (int64_t at = 0; at < n; at += kPart) {
    const IntVec key = hn::LoadU(tag, room.keys + at);
    const auto reaches = hn::Gt(key, below);
    hn::StoreU(hn::Compress(key, reaches), tag, room.candidate_keys + count);
    hn::StoreU(hn::Compress(PlacesFrom(at), reaches), tag, room.candidates + count);
    count += hn::CountTrue(tag, reaches);
  }
  return count;
}

// A key that at least `keep` of keys[0 .. n) reach: the keep-th largest among the maxima of about 2 · keep runs.
int32_t Threshold(SelectRoom& room, int64_t n, int64_t keep) {
  const IntTag tag;
  const int64_t vectors = RoundUp(n) / kPart;
  const int64_t runs = std::min(vectors, (2 * keep + kPart - 1) / kPart);
  int32_t* maxima = room.candidate_keys;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t end = (run + 1) * vectors / runs;
    IntVec most = hn::Set(tag, kLowestKey);
    for (int64_t v = run * vectors / runs; v < end; ++v) most = hn::Max(most, hn::LoadU(tag, room.keys + v * kPart));
    hn::StoreU(most, tag, maxima + run * kPart);
  }
  if (runs * kPart <= kMostRanked) {
    Rank(maxima, runs * kPart, room.ranks);
    return maxima[std::find(room.ranks, room.ranks + runs * kPart, keep - 1) - room.ranks];
  }
  std::nth_element(maxima, maxima + keep - 1, maxima + runs * kPart, std::greater<int32_t>());
  return maxima[keep - 1];
}

// order[0 .. keep) = where the `keep` largest of n scores are, largest first; NaN last; the lower index among equals.
void Largest(SelectRoom& room, const float* scores, int64_t n, int64_t keep) {
  MakeKeys(scores, n, room.keys);
  OrderCandidates(room, Filter(room, n, Threshold(room, n, keep)), keep);
}

// The sums of the staircase, row after row; each row is written in whole vectors and its excess overwritten by the next.
void AddPairs(const SelectRoom& room, const Staircase& stairs, int64_t keep) {
  const FloatTag f;
  float* to = room.sums;
  for (int64_t i = 0; i < keep; ++i) {
    const FloatVec first = hn::Set(f, room.best_score[0][i]);
    for (int64_t j = 0; j < stairs.columns[i]; j += kPart) {
      hn::StoreU(hn::Add(first, hn::LoadU(f, room.best_score[1] + j)), f, to + j);
    }
    to += stairs.columns[i];
  }
}

// The largest corner: `keep` pairs reach it.
int32_t PairThreshold(const SelectRoom& room, const Staircase& stairs) {
  int32_t threshold = kLowestKey;
  for (int32_t corner : stairs.corners) threshold = std::max(threshold, room.keys[corner]);
  return threshold;
}

// order[0 .. keep) = the pairs with the largest sums, as places in the staircase.
void LargestPairs(SelectRoom& room, const Staircase& stairs, int64_t keep) {
  const int64_t pairs = static_cast<int64_t>(stairs.i.size());
  AddPairs(room, stairs, keep);
  MakeKeys(room.sums, pairs, room.keys);
  int64_t count = Filter(room, pairs, PairThreshold(room, stairs));
  if (count < keep) count = Filter(room, pairs, kLowestKey);  // ∞ − ∞ breaks the order of the sums
  OrderCandidates(room, count, keep);
}

void Softmax(const float* scores, int64_t n, float* weights) {
  const Lanes most = Set(scores[0]);
  Lanes total = Zero();
  for (int64_t r = 0; r < n; r += kLanes) {
    const Lanes e = Exp(LoadFirst(scores + r, n - r) - most);
    total = total + Select(FirstLanes(n - r), e, Zero());
    StoreFirst(e, weights + r, n - r);
  }
  const Lanes sum = Set(Sum(total));
  for (int64_t r = 0; r < n; r += kLanes) StoreFirst(LoadFirst(weights + r, n - r) / sum, weights + r, n - r);
}

// The search of one token and head from its half scores.
void Choose(const Context& context, SelectRoom& room, const ProductKeySearchArgs& args, int64_t t, int64_t h,
            const float* const (&half_scores)[2]) {
  const int64_t knn = args.rows.dim(2), n_keys = args.half_keys->spec().n;
  const int64_t keep = args.knn_of_token ? args.knn_of_token(t) : knn;
  float* scores = &args.scores(t, h, 0);
  float* weights = &args.weights(t, h, 0);
  int32_t* rows = &args.rows(t, h, 0);
  if (keep > 0) {
    for (int s = 0; s < 2; ++s) {
      Largest(room, half_scores[s], n_keys, keep);
      for (int64_t r = 0; r < keep; ++r) {
        room.best[s][r] = room.order[r];
        room.best_score[s][r] = half_scores[s][room.order[r]];
      }
    }
    const Staircase& stairs = *context.staircases[keep];
    LargestPairs(room, stairs, keep);
    for (int64_t r = 0; r < keep; ++r) {
      const int32_t pair = room.order[r];
      scores[r] = room.sums[pair];
      rows[r] = static_cast<int32_t>(room.best[0][stairs.i[pair]] * n_keys + room.best[1][stairs.j[pair]]);
    }
    Softmax(scores, keep, weights);
  }
  std::fill(scores + keep, scores + knn, 0.0f);
  std::fill(weights + keep, weights + knn, 0.0f);
  std::fill(rows + keep, rows + knn, -1);
}

constexpr double kChooseNs = 1500;

struct Search {
  Context& context;
  const PackedMatrix& half_keys;
  const ProductKeySearchArgs& args;
  RoundedRows query;
  int64_t num_tokens, mem_heads, half_dim, padded_keys, most_scores;

  // Half scores of tokens [t, end) in one group's panels [panel, end_panel); one token's scores `stride` from the next's.
  void Score(int64_t group, int64_t panel, int64_t end_panel, int64_t t, int64_t end, float* out, int64_t stride) const {
    PanelProduct(half_keys, group, panel, end_panel, end - t,
                 {.x = query.x + t * query.stride + group * half_dim,
                  .x_stride = query.stride,
                  .out = out + panel * kPanel,
                  .out_stride = stride,
                  .columns = padded_keys - panel * kPanel,
                  .bias = nullptr});
  }

  // A task is one head of a block of tokens, whose scores stay in the second cache.
  void HeadByHead(int64_t block) const {
    const int64_t blocks = (num_tokens + block - 1) / block;
    const double cost = ProductNs(half_keys, num_tokens) + num_tokens * mem_heads * kChooseNs;
    context.pool.ParallelFor(blocks * mem_heads, cost, [&](int64_t task, int thread) {
      const int64_t h = task / blocks, t = task % blocks * block, end = std::min(num_tokens, t + block);
      SelectRoom room(context.of_thread[thread], most_scores, args.rows.dim(2), block * 2 * padded_keys);
      for (int64_t s = 0; s < 2; ++s) {
        Score(h * 2 + s, 0, half_keys.panels(), t, end, room.scores + s * padded_keys, 2 * padded_keys);
      }
      for (int64_t i = t; i < end; ++i) {
        const float* first = room.scores + (i - t) * 2 * padded_keys;
        Choose(context, room, args, i, h, {first, first + padded_keys});
      }
    });
  }

  // Few tokens: reading the keys is what costs, so the threads share their panels.
  void ScoreThenChoose(float* scores) const {
    const int64_t task_panels = TaskPanels(half_keys);
    const int64_t groups = mem_heads * 2, stride = groups * padded_keys;
    const int64_t blocks = (half_keys.panels() + task_panels - 1) / task_panels;
    context.pool.ParallelFor(groups * blocks, ProductNs(half_keys, num_tokens), [&](int64_t task, int) {
      const int64_t group = task / blocks, panel = task % blocks * task_panels;
      Score(group, panel, std::min(half_keys.panels(), panel + task_panels), 0, num_tokens, scores + group * padded_keys, stride);
    });
    const int64_t searches = num_tokens * mem_heads;
    context.pool.ParallelFor(searches, searches * kChooseNs, [&](int64_t task, int thread) {
      SelectRoom room(context.of_thread[thread], most_scores, args.rows.dim(2), 0);
      const int64_t t = task / mem_heads, h = task % mem_heads;
      const float* first = scores + t * stride + h * 2 * padded_keys;
      Choose(context, room, args, t, h, {first, first + padded_keys});
    });
  }
};

void ProductKeySearch(Context& context, const PackedMatrix& half_keys, const ProductKeySearchArgs& args) {
  const int64_t num_tokens = args.query.dim(0), mem_heads = args.query.dim(1), knn = args.rows.dim(2);
  if (num_tokens == 0 || mem_heads == 0) return;
  EnsureStaircase(context, knn);
  for (int64_t t = 0; args.knn_of_token && t < num_tokens; ++t) EnsureStaircase(context, args.knn_of_token(t));

  const int64_t width = mem_heads * 2 * half_keys.spec().k, padded_keys = half_keys.panels() * kPanel;
  const int64_t groups = mem_heads * 2;
  constexpr int64_t kBlock = 4 * 6, kBlockBytes = 512 << 10;
  const int64_t block = std::clamp<int64_t>(kBlockBytes / (2 * padded_keys * 4), 1, kBlock);
  const bool head_by_head = (num_tokens + block - 1) / block * mem_heads >= 2 * context.pool.size() && num_tokens >= 8;
  const RoundedRows query = Rounded(context.pool, context.rounded, half_keys, args.query.data, num_tokens, width);
  const Search search{.context = context,
                      .half_keys = half_keys,
                      .args = args,
                      .query = query,
                      .num_tokens = num_tokens,
                      .mem_heads = mem_heads,
                      .half_dim = half_keys.spec().k,
                      .padded_keys = padded_keys,
                      .most_scores = std::max<int64_t>(padded_keys, context.staircases[knn]->i.size())};
  if (head_by_head) {
    search.HeadByHead(block);
  } else {
    search.ScoreThenChoose(context.shared.Get<float>(num_tokens * groups * padded_keys));
  }
}

}  // namespace memserve::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace memserve::kernels::cpu {

HWY_EXPORT(ProductKeySearch);

void AddProductKeySearch(size_t index, Functions& functions) {
  functions.product_key_search = HWY_DISPATCH_TABLE(ProductKeySearch)[index];
}

}  // namespace memserve::kernels::cpu
#endif
