// The gather: weighted sums of rows, and dot products with rows. A row is a handful of cache misses and its arithmetic is cheaper
// than those, so rows are fetched ahead. Measured on Zen 4 (2 KiB rows): into the second cache beats into the first by a quarter to
// two fifths, four rows' lines in turn beat row after row, which is slower than no prefetch at all; 8 to 32 rows ahead are alike.
#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/embedding_bag.cc"
#include "kernels/cpu/foreach_target.h"
#include "kernels/cpu/functions.h"
#include "kernels/cpu/lanes-inl.h"
#include "kernels/cpu/row_store.h"

#ifndef MEMSERVE_KERNELS_CPU_EMBEDDING_BAG_CC_
#define MEMSERVE_KERNELS_CPU_EMBEDDING_BAG_CC_
namespace memserve::kernels::cpu {

// One term of a bag: where its row begins, as f32 if it comes from an overlay, else in the table's format.
struct Term {
  const void* row;
  float weight;
  bool from_overlay;
};

inline constexpr int64_t kTogether = 4;  // rows summed, and fetched, in turn
inline constexpr int64_t kAhead = 16;    // terms between a row's fetch and its use

inline const float* OverlayRow(const RowOverlay& overlay, int32_t row, int64_t columns) {
  const auto found = std::lower_bound(overlay.rows.begin(), overlay.rows.end(), row);
  if (found == overlay.rows.end() || *found != row) return nullptr;
  return overlay.values.data() + (found - overlay.rows.begin()) * columns;
}

// The rows to fetch while the ones before them are summed, a cache line of each in turn. Forced inline: gcc takes a function that
// only prefetches for one without effect and drops its calls.
struct Fetch {
  const char* row[kTogether];

  // Terms from `at` on; where there are none, a row that is there already.
  Fetch(const Term* at, const Term* end, const Term* here) {
    for (int64_t r = 0; r < kTogether; ++r) row[r] = static_cast<const char*>((at + r < end ? at + r : here)->row);
  }
  HWY_INLINE void Line(int64_t byte) const {
    for (int64_t r = 0; r < kTogether; ++r) __builtin_prefetch(row[r] + byte, 0, 2);
  }
};

}  // namespace memserve::kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace memserve::kernels::cpu::HWY_NAMESPACE {

// A cache line of each row at a time. Sums of bf16 rows lie as 16 even columns, then 16 odd ones, of every 32.
template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);

template <int kRows>
HWY_INLINE void AddLine(const float* const (&row)[kRows], const Lanes (&weight)[kRows], int64_t c, float* sums) {
  Lanes sum = Load(sums + c);
  for (int r = 0; r < kRows; ++r) sum = MulAdd(Load(row[r] + c), weight[r], sum);
  Store(sum, sums + c);
}
template <int kRows>
HWY_INLINE void AddLine(const BFloat16* const (&row)[kRows], const Lanes (&weight)[kRows], int64_t c, float* sums) {
  Lanes even = Load(sums + c), odd = Load(sums + c + kLanes);
  for (int r = 0; r < kRows; ++r) {
    even = MulAdd(LoadEven(row[r] + c), weight[r], even);
    odd = MulAdd(LoadOdd(row[r] + c), weight[r], odd);
  }
  Store(even, sums + c);
  Store(odd, sums + c + kLanes);
}

// sums[c] += Σ_r weight_r · row_r[c], r ascending, in whole lines: what lies beyond the last column is never read back.
template <int kRows, typename T>
HWY_INLINE void AddRows(const Term* terms, int64_t first, int64_t columns, float* sums, const Fetch& ahead) {
  const T* row[kRows];
  Lanes weight[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = static_cast<const T*>(terms[r].row) + first;
    weight[r] = Set(terms[r].weight);
  }
  for (int64_t c = 0; c < columns; c += kLine<T>) {
    ahead.Line((first + c) * sizeof(T));
    AddLine<kRows>(row, weight, c, sums);
  }
}

// An overlay's row is f32 and ends where its vector ends.
template <typename T>
void AddOverlayRow(const Term& term, int64_t first, int64_t columns, float* sums) {
  const float* row = static_cast<const float*>(term.row) + first;
  const Lanes weight = Set(term.weight);
  for (int64_t c = 0; c < columns; c += kLine<T>) {
    float line[kLine<T>] = {};
    std::copy(row + c, row + std::min(columns, c + kLine<T>), line);
    if constexpr (std::is_same_v<T, float>) {
      Store(MulAdd(Load(line), weight, Load(sums + c)), sums + c);
    } else {
      Lanes even, odd;
      LoadEvenOdd(line, even, odd);
      Store(MulAdd(even, weight, Load(sums + c)), sums + c);
      Store(MulAdd(odd, weight, Load(sums + c + kLanes)), sums + c + kLanes);
    }
  }
}

template <typename T>
void WriteSums(const float* sums, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; c += kLine<T>) {
    float line[kLine<T>];
    if constexpr (std::is_same_v<T, float>) {
      Store(Load(sums + c), line);
    } else {
      StoreEvenOdd(Load(sums + c), Load(sums + c + kLanes), line);
    }
    std::copy(line, line + std::min(kLine<T>, columns - c), out + c);
  }
}

// Columns [first, first + columns) of one bag. `all_end` bounds what may be fetched ahead: the bags that follow.
template <typename T>
void SumBag(const Term* term, const Term* end, const Term* all_end, int64_t first, int64_t columns, float* sums, float* out) {
  std::fill(sums, sums + (columns + kLine<T> - 1) / kLine<T> * kLine<T>, 0.0f);
  while (term < end) {
    const Fetch ahead(term + kAhead, all_end, term);
    const Term* together = std::min(term + kTogether, end);
    if (together == term + kTogether && std::none_of(term, together, [](const Term& t) { return t.from_overlay; })) {
      AddRows<kTogether, T>(term, first, columns, sums, ahead);
      term = together;
    } else if (!term->from_overlay) {
      AddRows<1, T>(term++, first, columns, sums, ahead);
    } else {
      AddOverlayRow<T>(*term++, first, columns, sums);
    }
  }
  WriteSums<T>(sums, columns, out);
}

template <typename T>
HWY_INLINE void FetchFirst(const Term* term, const Term* end, int64_t first, int64_t columns) {
  end = std::min(term + kAhead, end);
  for (; term < end; term += kTogether) {
    const Fetch ahead(term, end, term);
    for (int64_t c = 0; c < columns; c += kLine<T>) ahead.Line((first + c) * sizeof(T));
  }
}

// The terms of bags [b, end), bag after bag; ends[i] is where those of bag b + i end.
template <typename T>
void ListTerms(const HostRowStore& table, const EmbeddingBagArgs& args, int64_t b, int64_t end, Term* terms, Term** ends) {
  const int64_t bag = args.rows.dim(1), columns = table.spec().columns();
  for (; b < end; ++b, *ends++ = terms) {
    const int32_t overlay = args.overlay_of_bag ? args.overlay_of_bag(b) : -1;
    const int32_t* rows = args.rows.data + b * bag;
    const float* weights = args.weights.data + b * bag;
    for (int64_t i = 0; i < bag; ++i) {
      if (rows[i] < 0) continue;
      const float* other = overlay >= 0 ? OverlayRow(*args.overlays[overlay], rows[i], columns) : nullptr;
      const void* from = other != nullptr ? static_cast<const void*>(other) : table.rows<T>() + rows[i] * columns;
      *terms++ = {from, weights[i], other != nullptr};
    }
  }
}

// Bags [b, end), columns [first, first + columns).
template <typename T>
void SumBags(Scratch& scratch, const HostRowStore& table, const EmbeddingBagArgs& args, int64_t b, int64_t end, int64_t first,
             int64_t columns) {
  const int64_t bags = end - b, most_terms = bags * args.rows.dim(1) + 1;
  Term* terms = scratch.Get<Term>(most_terms + (bags + columns + 2 * kLanes) / 2);
  Term** ends = reinterpret_cast<Term**>(terms + most_terms);
  float* sums = reinterpret_cast<float*>(ends + bags);
  ListTerms<T>(table, args, b, end, terms, ends);
  FetchFirst<T>(terms, ends[bags - 1], first, columns);
  for (int64_t i = 0; i < bags; ++i) {
    SumBag<T>(i == 0 ? terms : ends[i - 1], ends[i], ends[bags - 1], first, columns, sums,
              args.out.data + (b + i) * table.spec().columns() + first);
  }
}

void EmbeddingBag(Context& context, const HostRowStore& table, const EmbeddingBagArgs& args) {
  // Bags that one task takes: many, so that fetching runs ahead over the ends of bags.
  constexpr int64_t kTaskBags = 32;
  constexpr int64_t kColumnStep = 64;  // whole cache lines of every format
  const int64_t bags = args.rows.dim(0), columns = table.spec().columns();
  if (bags == 0) return;
  const bool bf16 = table.spec().format == DType::kBF16;
  const int64_t threads = context.pool.size();
  // Few bags: the threads share the columns instead, at cache lines.
  const int64_t split = bags >= 2 * threads ? 1 : std::clamp<int64_t>(columns / kColumnStep, 1, threads);
  const int64_t share = split == 1 ? columns : columns / kColumnStep / split * kColumnStep;
  const int64_t take = std::clamp<int64_t>(threads == 1 ? bags : bags / (4 * threads), 1, kTaskBags);
  const int64_t bag_tasks = (bags + take - 1) / take;
  const double bytes = static_cast<double>(args.rows.size()) * columns * SizeOf(table.spec().format);
  context.pool.ParallelFor(bag_tasks * split, bytes / 15, [&](int64_t task, int thread) {
    const int64_t b = task / split * take, first = task % split * share;
    const int64_t width = task % split == split - 1 ? columns - first : share;
    (bf16 ? SumBags<BFloat16> : SumBags<float>)(context.of_thread[thread], table, args, b, std::min(bags, b + take), first, width);
  });
}

// Σ_c row[c] · x[c]: sixteen sums over every sixteenth column, added in a fixed order.
template <typename T>
float Dot(const T* row, const float* x, int64_t columns, const Fetch* ahead) {
  Lanes sum = Zero();
  for (int64_t c = 0; c < columns; c += kLanes) {
    if (ahead != nullptr && c % kLine<T> == 0) ahead->Line(c * sizeof(T));
    const int64_t left = columns - c;
    const Lanes value = Load(row + c);
    sum = MulAdd(left < kLanes ? Select(FirstLanes(left), value, Zero()) : value, LoadFirst(x + c, left), sum);
  }
  return Sum(sum);
}

// With each fourth row come the lines of the four that are to be fetched.
template <typename T>
void DotBag(const HostRowStore& table, const int32_t* rows, int64_t bag, const float* x, float* out) {
  const int64_t columns = table.spec().columns();
  const auto term_of = [&](int64_t i) { return Term{table.rows<T>() + std::max(rows[i], 0) * columns, 0, false}; };
  for (int64_t i = 0; i < bag; ++i) {
    Term terms[kTogether] = {};
    const int64_t count = i % kTogether == 0 ? std::clamp<int64_t>(bag - i - kAhead, 0, kTogether) : 0;
    for (int64_t r = 0; r < count; ++r) terms[r] = term_of(i + kAhead + r);
    const Fetch ahead(terms, terms + count, terms);
    const T* row = table.rows<T>() + rows[i] * columns;
    out[i] = rows[i] < 0 ? 0.0f : Dot(row, x, columns, count > 0 ? &ahead : nullptr);
  }
}

void RowDot(Context& context, const HostRowStore& table, const RowDotArgs& args) {
  constexpr int64_t kTaskRows = 64;
  const int64_t num_tokens = args.rows.dim(0), bag = args.rows.dim(1), dim = args.x.dim(1);
  const int64_t runs = (bag + kTaskRows - 1) / kTaskRows;
  const bool bf16 = table.spec().format == DType::kBF16;
  const double bytes = static_cast<double>(args.rows.size()) * table.spec().columns() * SizeOf(table.spec().format);
  context.pool.ParallelFor(num_tokens * runs, bytes / 12, [&](int64_t task, int) {
    const int64_t t = task / runs, first = task % runs * kTaskRows;
    const int64_t at = t * bag + first;
    (bf16 ? DotBag<BFloat16> : DotBag<float>)(table, args.rows.data + at, std::min(kTaskRows, bag - first),
                                              args.x.data + t * dim + table.spec().first_column, args.out.data + at);
  });
}

}  // namespace memserve::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace memserve::kernels::cpu {

HWY_EXPORT(EmbeddingBag);
HWY_EXPORT(RowDot);

void AddEmbeddingBag(size_t index, Functions& functions) {
  functions.embedding_bag = HWY_DISPATCH_TABLE(EmbeddingBag)[index];
  functions.row_dot = HWY_DISPATCH_TABLE(RowDot)[index];
}

}  // namespace memserve::kernels::cpu
#endif
