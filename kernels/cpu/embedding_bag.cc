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

// The elements of an int4 row: two columns each.
struct Nibbles {
  uint8_t bits;
};

// One term of a bag: where its row begins, as f32 if it comes from an overlay, else in the table's format (and then the row's scale is
// in the weight).
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

// A cache line of each row at a time, in columns.
template <typename T>
constexpr int64_t kColumnsIn = std::is_same_v<T, Nibbles> ? 2 : 1;
template <typename T>
constexpr int64_t kLine = 64 / sizeof(T) * kColumnsIn<T>;

// How sums lie: in order, or as 16 even columns, then 16 odd ones, of every 32, which is how the bits of such rows come apart.
template <typename T>
constexpr bool kEvenOdd = std::is_same_v<T, BFloat16> || std::is_same_v<T, Nibbles>;
constexpr int64_t kPair = 2 * kLanes;

template <typename T>
constexpr bool kScaled = std::is_same_v<T, int8_t> || std::is_same_v<T, Nibbles>;

template <typename T>
HWY_INLINE const T* At(const void* row, int64_t column) {
  return static_cast<const T*>(row) + column / kColumnsIn<T>;
}

// Columns [c, c + 32) of a row, as they lie in the sums.
HWY_INLINE void LoadPair(const float* at, Lanes& a, Lanes& b) { a = Load(at), b = Load(at + kLanes); }
HWY_INLINE void LoadPair(const int8_t* at, Lanes& a, Lanes& b) { a = Load(at), b = Load(at + kLanes); }
HWY_INLINE void LoadPair(const BFloat16* at, Lanes& a, Lanes& b) { a = LoadEven(at), b = LoadOdd(at); }
HWY_INLINE void LoadPair(const Nibbles* at, Lanes& a, Lanes& b) { LoadNibbles(reinterpret_cast<const uint8_t*>(at), a, b); }

template <int kRows, typename T>
HWY_INLINE void AddPair(const T* const (&row)[kRows], const Lanes (&weight)[kRows], int64_t c, float* sums) {
  Lanes a = Load(sums + c), b = Load(sums + c + kLanes);
  for (int r = 0; r < kRows; ++r) {
    Lanes x, y;
    LoadPair(At<T>(row[r], c), x, y);
    a = MulAdd(x, weight[r], a);
    b = MulAdd(y, weight[r], b);
  }
  Store(a, sums + c);
  Store(b, sums + c + kLanes);
}
// A line of f32 is half of that.
template <int kRows, typename T>
HWY_INLINE void AddLine(const T* const (&row)[kRows], const Lanes (&weight)[kRows], int64_t c, float* sums) {
  if constexpr (kLine<T> < kPair) {
    Lanes sum = Load(sums + c);
    for (int r = 0; r < kRows; ++r) sum = MulAdd(Load(row[r] + c), weight[r], sum);
    Store(sum, sums + c);
  } else {
    for (int64_t pair = 0; pair < kLine<T>; pair += kPair) AddPair<kRows>(row, weight, c + pair, sums);
  }
}

// sums[c] += Σ_r weight_r · row_r[c], r ascending, in whole lines: what lies beyond the last column is never read back.
template <int kRows, typename T>
HWY_INLINE void AddRows(const Term* terms, int64_t first, int64_t columns, float* sums, const Fetch& ahead) {
  const T* row[kRows];
  Lanes weight[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = At<T>(terms[r].row, first);
    weight[r] = Set(terms[r].weight);
  }
  for (int64_t c = 0; c < columns; c += kLine<T>) {
    ahead.Line((first + c) / kColumnsIn<T> * sizeof(T));
    AddLine<kRows>(row, weight, c, sums);
  }
}

// An overlay's row is f32 and ends where its vector ends.
template <typename T>
void AddOverlayRow(const Term& term, int64_t first, int64_t columns, float* sums) {
  const float* row = static_cast<const float*>(term.row) + first;
  const Lanes weight = Set(term.weight);
  for (int64_t c = 0; c < columns; c += kPair) {
    float line[kPair] = {};
    std::copy(row + c, row + std::min(columns, c + kPair), line);
    Lanes a, b;
    if constexpr (kEvenOdd<T>) LoadEvenOdd(line, a, b);
    else LoadPair(line, a, b);
    Store(MulAdd(a, weight, Load(sums + c)), sums + c);
    Store(MulAdd(b, weight, Load(sums + c + kLanes)), sums + c + kLanes);
  }
}

template <typename T>
void WriteSums(const float* sums, int64_t columns, float* out) {
  if constexpr (!kEvenOdd<T>) {
    std::copy(sums, sums + columns, out);
    return;
  }
  for (int64_t c = 0; c < columns; c += kPair) {
    float line[kPair];
    StoreEvenOdd(Load(sums + c), Load(sums + c + kLanes), line);
    std::copy(line, line + std::min(kPair, columns - c), out + c);
  }
}

// Floats that the sums of so many columns take: whole lines, and whole pairs.
template <typename T>
constexpr int64_t SumsOf(int64_t columns) {
  constexpr int64_t kUnit = std::max(kLine<T>, kPair);
  return (columns + kUnit - 1) / kUnit * kUnit;
}

// Columns [first, first + columns) of one bag. `all_end` bounds what may be fetched ahead: the bags that follow.
template <typename T>
void SumBag(const Term* term, const Term* end, const Term* all_end, int64_t first, int64_t columns, float* sums, float* out) {
  std::fill(sums, sums + SumsOf<T>(columns), 0.0f);
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
    for (int64_t c = 0; c < columns; c += kLine<T>) ahead.Line((first + c) / kColumnsIn<T> * sizeof(T));
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
      const void* from = other != nullptr ? static_cast<const void*>(other) : table.row(rows[i]);
      const float scale = kScaled<T> && other == nullptr ? table.scales()[rows[i]] : 1.0f;
      *terms++ = {from, weights[i] * scale, other != nullptr};
    }
  }
}

// Bags [b, end), columns [first, first + columns).
template <typename T>
void SumBags(Scratch& scratch, const HostRowStore& table, const EmbeddingBagArgs& args, int64_t b, int64_t end, int64_t first,
             int64_t columns) {
  const int64_t bags = end - b, most_terms = bags * args.rows.dim(1) + 1;
  Term* terms = scratch.Get<Term>(most_terms + (bags * sizeof(Term*) + SumsOf<T>(columns) * sizeof(float)) / sizeof(Term) + 1);
  Term** ends = reinterpret_cast<Term**>(terms + most_terms);
  float* sums = reinterpret_cast<float*>(ends + bags);
  ListTerms<T>(table, args, b, end, terms, ends);
  FetchFirst<T>(terms, ends[bags - 1], first, columns);
  for (int64_t i = 0; i < bags; ++i) {
    SumBag<T>(i == 0 ? terms : ends[i - 1], ends[i], ends[bags - 1], first, columns, sums,
              args.out.data + (b + i) * table.spec().columns() + first);
  }
}

// Calls fn with an element type in place of a format.
template <typename Fn>
void WithElement(DType format, const Fn& fn) {
  switch (format) {
    case DType::kBF16:
      return fn(BFloat16());
    case DType::kI8:
      return fn(int8_t());
    case DType::kI4:
      return fn(Nibbles());
    default:
      return fn(float());
  }
}

void EmbeddingBag(Context& context, const HostRowStore& table, const EmbeddingBagArgs& args) {
  // Bags that one task takes: many, so that fetching runs ahead over the ends of bags.
  constexpr int64_t kTaskBags = 32;
  constexpr int64_t kColumnStep = 128;  // whole cache lines of every format
  const int64_t bags = args.rows.dim(0), columns = table.spec().columns();
  if (bags == 0) return;
  const int64_t threads = context.pool.size();
  // Few bags: the threads share the columns instead, at cache lines.
  const int64_t split = bags >= 2 * threads ? 1 : std::clamp<int64_t>(columns / kColumnStep, 1, threads);
  const int64_t share = split == 1 ? columns : columns / kColumnStep / split * kColumnStep;
  const int64_t take = std::clamp<int64_t>(threads == 1 ? bags : bags / (4 * threads), 1, kTaskBags);
  const int64_t bag_tasks = (bags + take - 1) / take;
  const double bytes = static_cast<double>(args.rows.size()) * table.row_bytes();
  WithElement(table.spec().format, [&](auto element) {
    context.pool.ParallelFor(bag_tasks * split, bytes / 15, [&](int64_t task, int thread) {
      const int64_t b = task / split * take, first = task % split * share;
      const int64_t width = task % split == split - 1 ? columns - first : share;
      SumBags<decltype(element)>(context.of_thread[thread], table, args, b, std::min(bags, b + take), first, width);
    });
  });
}

// Σ_c row[c] · x[c]: sixteen sums over every sixteenth column (of int4: every thirty-second, even before odd), added in a fixed order.
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
template <>
float Dot(const Nibbles* row, const float* x, int64_t columns, const Fetch* ahead) {
  Lanes sum = Zero();
  for (int64_t c = 0; c < columns; c += kPair) {
    if (ahead != nullptr && c % kLine<Nibbles> == 0) ahead->Line(c / 2);
    float last[kPair] = {};
    if (columns - c < kPair) std::copy(x + c, x + columns, last);
    Lanes even, odd, x_even, x_odd;
    LoadPair(At<Nibbles>(row, c), even, odd);
    LoadEvenOdd(columns - c < kPair ? last : x + c, x_even, x_odd);
    sum = MulAdd(odd, x_odd, MulAdd(even, x_even, sum));
  }
  return Sum(sum);
}

// With each fourth row come the lines of the four that are to be fetched.
template <typename T>
void DotBag(const HostRowStore& table, const int32_t* rows, int64_t bag, const float* x, float* out) {
  const int64_t columns = table.spec().columns();
  for (int64_t i = 0; i < bag; ++i) {
    Term terms[kTogether] = {};
    const int64_t count = i % kTogether == 0 ? std::clamp<int64_t>(bag - i - kAhead, 0, kTogether) : 0;
    for (int64_t r = 0; r < kTogether; ++r) {
      if (r < count) terms[r].row = table.row(std::max(rows[i + kAhead + r], 0));
    }
    const Fetch ahead(terms, terms + count, terms);
    if (rows[i] < 0) {
      out[i] = 0;
      continue;
    }
    const float dot = Dot(At<T>(table.row(rows[i]), 0), x, columns, count > 0 ? &ahead : nullptr);
    out[i] = kScaled<T> ? dot * table.scales()[rows[i]] : dot;
  }
}

void RowDot(Context& context, const HostRowStore& table, const RowDotArgs& args) {
  constexpr int64_t kTaskRows = 64;
  const int64_t num_tokens = args.rows.dim(0), bag = args.rows.dim(1), dim = args.x.dim(1);
  const int64_t runs = (bag + kTaskRows - 1) / kTaskRows;
  const double bytes = static_cast<double>(args.rows.size()) * table.row_bytes();
  WithElement(table.spec().format, [&](auto element) {
    context.pool.ParallelFor(num_tokens * runs, bytes / 12, [&](int64_t task, int) {
      const int64_t t = task / runs, first = task % runs * kTaskRows;
      const int64_t at = t * bag + first;
      DotBag<decltype(element)>(table, args.rows.data + at, std::min(kTaskRows, bag - first),
                                args.x.data + t * dim + table.spec().first_column, args.out.data + at);
    });
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
