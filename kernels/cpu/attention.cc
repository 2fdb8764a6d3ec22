// Keys lie with the tokens of a page side by side, so that sixteen scores are one chain over head_dim: [page][kv head][head_dim]
// [page_size]. Values lie token after token: [page][kv head][page_size][head_dim]. int8 codes become floats in registers; a key's
// scale meets its score, a value's scale its weight.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "kernels/cpu/foreach_target.h"
#include "kernels/cpu/functions.h"
#include "kernels/cpu/lanes-inl.h"

#ifndef MEMSERVE_KERNELS_CPU_ATTENTION_CC_
#define MEMSERVE_KERNELS_CPU_ATTENTION_CC_
namespace memserve::kernels::cpu {

inline constexpr int64_t kBlock = kAttentionBlock;
inline constexpr int kTileQueries = 4;  // queries and
inline constexpr int kTileBlocks = 4;   // blocks of keys whose scores are computed at once
inline constexpr int64_t kRunTokens = 16;

// Tokens of one sequence at consecutive positions, taken together.
struct Run {
  int64_t first, count;
};

// One head of one token: what it attends to, and its sums so far.
struct Query {
  const float* q;
  float* out;
  int64_t first, end;  // key positions
  float most;          // largest score so far
  float* weight_sums;  // [16]: each lane adds its own key of every block
  float* sums;         // [head_dim, padded]: the weighted values
};

}  // namespace memserve::kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace memserve::kernels::cpu::HWY_NAMESPACE {

// The pages of one sequence, for one KV head.
template <typename T>
struct Cache {
  const KvPages& pages;
  const int32_t* table;
  int64_t kv_head;

  int64_t Start(int64_t position) const {
    return (table[position / pages.page_size] * pages.kv_heads + kv_head) * pages.page_size * pages.head_dim;
  }
  const T* Keys(int64_t position) const { return static_cast<const T*>(pages.keys) + Start(position) + position % pages.page_size; }
  const T* Values(int64_t position) const {
    return static_cast<const T*>(pages.values) + Start(position) + position % pages.page_size * pages.head_dim;
  }
  // Of the sixteen tokens from `position` on.
  int64_t Scales(int64_t position) const {
    return (table[position / pages.page_size] * pages.kv_heads + kv_head) * pages.page_size + position % pages.page_size;
  }
};

// scores[q][b][·] = Σ_d q[d] · K[d] for the keys of kBlocks blocks.
template <int kQueries, int kBlocks, typename T>
void Scores(const Query* queries, const T* const* keys, int64_t head_dim, int64_t page_size, float* scores) {
  Lanes sums[kQueries][kBlocks];
  for (int q = 0; q < kQueries; ++q) {
    for (int b = 0; b < kBlocks; ++b) sums[q][b] = Zero();
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    Lanes key[kBlocks];
    for (int b = 0; b < kBlocks; ++b) key[b] = Load(keys[b] + d * page_size);
    for (int q = 0; q < kQueries; ++q) {
      const Lanes value = Set(queries[q].q[d]);
      for (int b = 0; b < kBlocks; ++b) sums[q][b] = MulAdd(key[b], value, sums[q][b]);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int b = 0; b < kBlocks; ++b) Store(sums[q][b], scores + (q * kTileBlocks + b) * kBlock);
  }
}

template <int kQueries, typename T>
void ScoresOfBlocks(const Query* queries, const T* const* keys, int blocks, int64_t head_dim, int64_t page_size, float* scores) {
  if (blocks == kTileBlocks) return Scores<kQueries, kTileBlocks>(queries, keys, head_dim, page_size, scores);
  for (int b = 0; b < blocks; ++b) {
    Scores<kQueries, 1>(queries, keys + b, head_dim, page_size, scores + b * kBlock);
  }
}

void Rescale(Query& query, float most, int64_t head_dim) {
  const Lanes factor = Exp(Set(query.most - most));
  Store(Load(query.weight_sums) * factor, query.weight_sums);
  for (int64_t d = 0; d < head_dim; d += kLanes) Store(Load(query.sums + d) * factor, query.sums + d);
  query.most = most;
}

// Turns the scores of the block at `position` into weights. Keys outside the query's range weigh nothing.
void Weigh(Query& query, int64_t position, float scale, int64_t head_dim, float* scores) {
  const auto lanes_before = [&](int64_t end) HWY_ATTR { return FirstLanes(std::clamp<int64_t>(end - position, 0, kBlock)); };
  const Lanes lowest = Set(-std::numeric_limits<float>::infinity());
  Lanes score = Load(scores) * Set(scale);
  if (query.end - position < kBlock) score = Select(lanes_before(query.end), score, lowest);
  if (query.first > position) score = Select(lanes_before(query.first), lowest, score);
  const float most = LargestOf(score);
  if (most > query.most) Rescale(query, most, head_dim);
  const Lanes weight = Exp(score - Set(query.most));
  Store(Load(query.weight_sums) + weight, query.weight_sums);
  Store(weight, scores);
}

// sums[d] += Σ weight[p] · V[p, d] for keys [from, to) of a block, ascending; columns [d, d + 16 · kVectors).
template <int kQueries, int kVectors, typename T>
void AddValues(const Query* queries, const float* weights, const T* values, int64_t from, int64_t to, int64_t head_dim, int64_t d) {
  Lanes sums[kQueries][kVectors];
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) sums[q][v] = Load(queries[q].sums + d + v * kLanes);
  }
  for (int64_t p = from; p < to; ++p) {
    Lanes value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = Load(values + p * head_dim + d + v * kLanes);
    for (int q = 0; q < kQueries; ++q) {
      const Lanes weight = Set(weights[q * kTileBlocks * kBlock + p]);
      for (int v = 0; v < kVectors; ++v) sums[q][v] = MulAdd(value[v], weight, sums[q][v]);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) Store(sums[q][v], queries[q].sums + d + v * kLanes);
  }
}

template <int kQueries, typename T>
void AddValues(const Query* queries, const float* weights, const T* values, int64_t from, int64_t to, int64_t head_dim) {
  if (from >= to) return;
  constexpr int kVectors = kPart == kLanes ? 4 : 1;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= head_dim; d += kVectors * kLanes) {
    AddValues<kQueries, kVectors>(queries, weights, values, from, to, head_dim, d);
  }
  for (; d < head_dim; d += kLanes) AddValues<kQueries, 1>(queries, weights, values, from, to, head_dim, d);
}

// Where all queries of the tile see a key they take it together; each alone at the ends of its range.
template <int kQueries, typename T>
void AddBlock(const Query* queries, const float* weights, const T* values, int64_t position, int64_t head_dim) {
  int64_t from[kQueries], to[kQueries], all_from = 0, all_to = kBlock;
  for (int q = 0; q < kQueries; ++q) {
    from[q] = std::clamp<int64_t>(queries[q].first - position, 0, kBlock);
    to[q] = std::clamp<int64_t>(queries[q].end - position, 0, kBlock);
    all_from = std::max(all_from, from[q]);
    all_to = std::min(all_to, to[q]);
  }
  const bool together = kQueries > 1 && all_from < all_to;
  for (int q = 0; q < kQueries; ++q) {
    AddValues<1>(queries + q, weights + q * kTileBlocks * kBlock, values, from[q], together ? all_from : to[q], head_dim);
  }
  if (!together) return;
  AddValues<kQueries>(queries, weights, values, all_from, all_to, head_dim);
  for (int q = 0; q < kQueries; ++q) {
    AddValues<1>(queries + q, weights + q * kTileBlocks * kBlock, values, all_to, to[q], head_dim);
  }
}

// kQueries queries over kTileBlocks blocks from `position` on (fewer at the end).
template <int kQueries, typename T>
void AttendTile(Query* queries, const Cache<T>& cache, int64_t position, int blocks, float scale) {
  const int64_t head_dim = cache.pages.head_dim;
  alignas(64) float scores[kQueries * kTileBlocks * kBlock];
  const T* keys[kTileBlocks];
  for (int b = 0; b < blocks; ++b) keys[b] = cache.Keys(position + b * kBlock);
  ScoresOfBlocks<kQueries>(queries, keys, blocks, head_dim, cache.pages.page_size, scores);
  for (int b = 0; b < blocks; ++b, position += kBlock) {
    for (int q = 0; q < kQueries; ++q) {
      const bool sees = queries[q].first < position + kBlock && position < queries[q].end;
      if (!sees) continue;
      float* block = scores + (q * kTileBlocks + b) * kBlock;
      if constexpr (std::is_same_v<T, int8_t>) Store(Load(block) * Load(cache.pages.key_scales() + cache.Scales(position)), block);
      Weigh(queries[q], position, scale, head_dim, block);
      if constexpr (std::is_same_v<T, int8_t>)
        Store(Load(block) * Load(cache.pages.value_scales() + cache.Scales(position)), block);
    }
    AddBlock<kQueries>(queries, scores + b * kBlock, cache.Values(position), position, head_dim);
  }
}

template <typename T>
void Attend(Query* queries, int64_t count, const Cache<T>& cache, float scale) {
  int64_t first = queries[0].first, end = queries[0].end;
  for (int64_t q = 1; q < count; ++q) {
    first = std::min(first, queries[q].first);
    end = std::max(end, queries[q].end);
  }
  for (int64_t at = first / kBlock * kBlock; at < end; at += kTileBlocks * kBlock) {
    const int blocks = static_cast<int>(std::min<int64_t>((end - at + kBlock - 1) / kBlock, kTileBlocks));
    int64_t q = 0;
    for (; q + kTileQueries <= count; q += kTileQueries) {
      AttendTile<kTileQueries>(queries + q, cache, at, blocks, scale);
    }
    for (; q + 2 <= count; q += 2) AttendTile<2>(queries + q, cache, at, blocks, scale);
    for (; q < count; ++q) AttendTile<1>(queries + q, cache, at, blocks, scale);
  }
  for (int64_t q = 0; q < count; ++q) {
    const Lanes total = Set(Sum(Load(queries[q].weight_sums)));
    for (int64_t d = 0; d < cache.pages.head_dim; d += kLanes) {
      StoreFirst(Load(queries[q].sums + d) / total, queries[q].out + d, cache.pages.head_dim - d);
    }
  }
}

// All heads of one run that share a KV head.
template <typename T>
void AttendRun(Scratch& scratch, const AttentionArgs& args, const Run& run, int64_t kv_head) {
  const int64_t heads = args.q.dim(1), head_dim = args.q.dim(2);
  const int64_t first_of_kv = (kv_head + args.first_kv_head) * args.queries_per_kv - args.first_query_head;
  const int64_t h0 = std::max<int64_t>(0, first_of_kv), h1 = std::min(heads, first_of_kv + args.queries_per_kv);
  if (h0 >= h1) return;
  const int64_t count = run.count * (h1 - h0);
  const int64_t padded = (head_dim + kLanes - 1) / kLanes * kLanes, floats = kLanes + padded;
  float* sums = scratch.Get<float>(count * (floats + static_cast<int64_t>(sizeof(Query) / sizeof(float))));
  std::fill(sums, sums + count * floats, 0.0f);
  Query* queries = reinterpret_cast<Query*>(sums + count * floats);
  Query* next = queries;
  for (int64_t t = run.first; t < run.first + run.count; ++t) {
    const int64_t end = args.positions(t) + 1;
    for (int64_t h = h0; h < h1; ++h, ++next, sums += floats) {
      *next = {.q = &args.q(t, h, 0),
               .out = &args.out(t, h, 0),
               .first = args.window > 0 ? std::max<int64_t>(0, end - args.window) : 0,
               .end = end,
               .most = -std::numeric_limits<float>::infinity(),
               .weight_sums = sums,
               .sums = sums + kLanes};
    }
  }
  const Cache<T> cache{args.pages, &args.block_tables(args.sequence(run.first), 0), kv_head};
  Attend(queries, count, cache, args.scale);
}

void Attention(Context& context, const AttentionArgs& args) {
  const int64_t num_tokens = args.q.dim(0), heads = args.q.dim(1), head_dim = args.q.dim(2);
  Run* runs = context.shared.Get<Run>(num_tokens);
  int64_t run_count = 0;
  double keys = 0;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const bool follows = t > 0 && args.sequence(t) == args.sequence(t - 1) && args.positions(t) == args.positions(t - 1) + 1;
    if (follows && runs[run_count - 1].count < kRunTokens) {
      ++runs[run_count - 1].count;
    } else {
      runs[run_count++] = {t, 1};
    }
    keys += args.window > 0 ? std::min<int64_t>(args.window, args.positions(t) + 1) : args.positions(t) + 1;
  }
  const int64_t kv_heads = args.pages.kv_heads;
  const auto attend = args.pages.dtype == DType::kBF16 ? AttendRun<BFloat16>
                      : args.pages.quantised()         ? AttendRun<int8_t>
                                                       : AttendRun<float>;
  context.pool.ParallelFor(run_count * kv_heads, keys * heads * head_dim * 0.1, [&](int64_t task, int thread) {
    attend(context.of_thread[thread], args, runs[task / kv_heads], task % kv_heads);
  });
}

inline void Put(float from, float* to) { *to = from; }
inline void Put(float from, BFloat16* to) { *to = ToBFloat16(from); }

// Codes `step` apart; returns the scale.
inline float Quantise(const float* x, int64_t count, int8_t* codes, int64_t step) {
  float largest = 0;
  bool finite = true;
  for (int64_t d = 0; d < count; ++d) {
    finite &= std::abs(x[d]) <= std::numeric_limits<float>::max();
    largest = std::max(largest, std::abs(x[d]));
  }
  const float scale = largest / 127;
  if (!finite || scale < std::numeric_limits<float>::min()) {
    for (int64_t d = 0; d < count; ++d) codes[d * step] = 0;
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  constexpr float kRound = 12582912.0f;  // 1.5 · 2²³: adding it leaves whole numbers, halves to even
  for (int64_t d = 0; d < count; ++d) {
    codes[d * step] = static_cast<int8_t>(std::clamp(x[d] / scale + kRound - kRound, -127.0f, 127.0f));
  }
  return scale;
}

inline void WriteQuantisedToken(const KvWriteArgs& args, int64_t t) {
  const KvPages& pages = args.pages;
  const int64_t slot = args.slots(t), page = slot / pages.page_size, place = slot % pages.page_size;
  for (int64_t h = 0; h < pages.kv_heads; ++h) {
    const int64_t start = (page * pages.kv_heads + h) * pages.page_size * pages.head_dim;
    int8_t* keys = static_cast<int8_t*>(pages.keys) + start + place;
    int8_t* values = static_cast<int8_t*>(pages.values) + start + place * pages.head_dim;
    pages.key_scales()[pages.ScalePlace(slot, h)] = Quantise(&args.k(t, h, 0), pages.head_dim, keys, pages.page_size);
    pages.value_scales()[pages.ScalePlace(slot, h)] = Quantise(&args.v(t, h, 0), pages.head_dim, values, 1);
  }
}

template <typename T>
void WriteToken(const KvWriteArgs& args, int64_t t) {
  const KvPages& pages = args.pages;
  const int64_t slot = args.slots(t), page = slot / pages.page_size, place = slot % pages.page_size;
  for (int64_t h = 0; h < pages.kv_heads; ++h) {
    const int64_t start = (page * pages.kv_heads + h) * pages.page_size * pages.head_dim;
    T* keys = static_cast<T*>(pages.keys) + start + place;
    T* values = static_cast<T*>(pages.values) + start + place * pages.head_dim;
    const float* k = &args.k(t, h, 0);
    const float* v = &args.v(t, h, 0);
    for (int64_t d = 0; d < pages.head_dim; ++d) Put(k[d], keys + d * pages.page_size);
    for (int64_t d = 0; d < pages.head_dim; ++d) Put(v[d], values + d);
  }
}

void KvWrite(Context& context, const KvWriteArgs& args) {
  const int64_t num_tokens = args.k.dim(0);
  const auto write = args.pages.dtype == DType::kBF16 ? WriteToken<BFloat16>
                     : args.pages.quantised()         ? WriteQuantisedToken
                                                      : WriteToken<float>;
  context.pool.ParallelFor(num_tokens, args.k.size() * 2.0, [&](int64_t t, int) { write(args, t); });
}

}  // namespace memserve::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace memserve::kernels::cpu {

HWY_EXPORT(Attention);
HWY_EXPORT(KvWrite);

void AddAttention(size_t index, Functions& functions) {
  functions.attention = HWY_DISPATCH_TABLE(Attention)[index];
  functions.kv_write = HWY_DISPATCH_TABLE(KvWrite)[index];
}

}  // namespace memserve::kernels::cpu
#endif
