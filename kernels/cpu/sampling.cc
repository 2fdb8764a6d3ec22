#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sampling.cc"
#include "kernels/cpu/foreach_target.h"
#include "kernels/cpu/functions.h"
#include "kernels/cpu/lanes-inl.h"
#include "kernels/random.h"

#ifndef MEMSERVE_KERNELS_CPU_SAMPLING_CC_
#define MEMSERVE_KERNELS_CPU_SAMPLING_CC_
namespace memserve::kernels::cpu {

inline constexpr float kLowest = -std::numeric_limits<float>::infinity();
inline constexpr int64_t kMassBlock = 512;  // weights summed at a time
inline constexpr int64_t kFew = 64;         // sorted candidates that top_p is tried on first
inline constexpr int64_t kBuckets = 2048;   // of the others, by weight: each e^(1/32) lighter than the last

inline float NanIsLowest(float logit) { return logit == logit ? logit : kLowest; }

// A logit and its id in one word: larger words first is larger logits first, then lower ids.
inline uint64_t Packed(float logit, int64_t id) {
  const float plain = NanIsLowest(logit) + 0.0f;  // −0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &plain, sizeof(bits));
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
inline int64_t IdOf(uint64_t packed) { return 0xffffffffu - static_cast<uint32_t>(packed); }

// Where a drawn point falls in a list of weights: the first whose running sum goes beyond it, never one without weight.
class Walk {
 public:
  Walk(double target, double sum, int64_t fallback) : target_(target), sum_(sum), choice_(fallback) {}
  // True once the point is passed.
  bool Step(double weight, int64_t id) {
    if (weight > 0) choice_ = id;
    sum_ += weight;
    return sum_ > target_;
  }
  int64_t choice() const { return choice_; }

 private:
  const double target_;
  double sum_;
  int64_t choice_;
};

}  // namespace memserve::kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace memserve::kernels::cpu::HWY_NAMESPACE {

// Lanes from `count` on, and NaN, are −inf.
HWY_INLINE Lanes LoadLogits(const float* logits, int64_t count) {
  const Lanes lowest = Set(kLowest);
  Lanes v = LoadFirst(logits, count);
  if (count < kLanes) v = Select(FirstLanes(count), v, lowest);
  LaneMask number;
  MEMSERVE_PARTS(p) number.part[p] = hn::Eq(v.part[p], v.part[p]);
  return Select(number, v, lowest);
}

// The largest logit and its lowest id; 0 where all are −inf.
struct Most {
  float logit;
  int64_t id;
};
Most ArgMax(const float* logits, int64_t n) {
  Lanes most = Set(kLowest);
  for (int64_t i = 0; i < n; i += kLanes) most = Max(LoadLogits(logits + i, n - i), most);
  const float logit = LargestOf(most);
  if (logit == kLowest) return {logit, 0};
  int64_t at = 0;
  const Lanes wanted = Set(logit);
  uint32_t found = 0;
  for (; found == 0; at += kLanes) found = EqualBits(LoadLogits(logits + at, n - at), wanted);
  return {logit, at - kLanes + __builtin_ctz(found)};
}

// log Σ e^(logit − most): short sums in float, theirs in double.
double LogTotal(const float* logits, int64_t n, float most) {
  double total = 0;
  for (int64_t block = 0; block < n; block += kMassBlock) {
    const int64_t end = std::min(n, block + kMassBlock);
    Lanes sum = Zero();
    for (int64_t i = block; i < end; i += kLanes) sum = sum + Exp(LoadLogits(logits + i, end - i) - Set(most));
    total += Sum(sum);
  }
  return std::log(total);
}

float LogSoftmax(const float* logits, int64_t n, float most, int64_t id) {
  return static_cast<float>(double{NanIsLowest(logits[id])} - most - LogTotal(logits, n, most));
}

// e^x for x <= 0: x = n·ln 2 + r and the series to r¹³, which leaves 4e-18.
template <class V>
HWY_INLINE V ExpOfNegative(V x) {
  const hn::DFromV<V> d;
  const hn::RebindToSigned<decltype(d)> i;
  x = hn::Max(x, hn::Set(d, -708.0));
  const V magic = hn::Set(d, 6755399441055744.0);  // 1.5·2⁵²: rounds to whole numbers, left in the low bits
  const V shifted = hn::MulAdd(x, hn::Set(d, 1.4426950408889634), magic);
  const V n = hn::Sub(shifted, magic);
  V r = hn::MulAdd(n, hn::Set(d, -6.93147180369123816490e-1), x);
  r = hn::MulAdd(n, hn::Set(d, -1.90821492927058770002e-10), r);
  double factorial = 6227020800.0;  // 13!
  V y = hn::Set(d, 1.0 / factorial);
  for (int k = 13; k > 0; --k) {
    factorial /= k;
    y = hn::MulAdd(y, r, hn::Set(d, 1.0 / factorial));
  }
  const auto power = hn::Sub(hn::BitCast(i, shifted), hn::BitCast(i, magic));
  return hn::BitCast(d, hn::Add(hn::BitCast(i, y), hn::ShiftLeft<52>(power)));
}

// weights[id] = e^((logits[id] − most) / temperature); masses[b] = the sum of a block. Returns the sum of all.
double MakeWeights(const float* logits, int64_t n, float most, double temperature, double* weights, double* masses) {
  const hn::CappedTag<double, 8> d;
  const hn::Rebind<float, decltype(d)> f;
  const auto scale = hn::Set(d, 1.0 / temperature);
  const int64_t step = hn::Lanes(d);
  double total = 0;
  for (int64_t block = 0; block < n; block += kMassBlock) {
    const int64_t end = std::min(n, block + kMassBlock);
    for (int64_t i = block; i < end; i += step) {
      const auto logit = hn::MaskedLoad(hn::FirstN(f, std::min(step, end - i)), f, logits + i);
      const auto x = hn::Mul(hn::Sub(hn::PromoteTo(d, logit), hn::Set(d, double{most})), scale);
      // NaN and what e^x cannot tell from 0.
      hn::StoreU(hn::IfThenElseZero(hn::Gt(x, hn::Set(d, -708.0)), ExpOfNegative(x)), d, weights + i);
    }
    std::fill(weights + end, weights + (end + 7) / 8 * 8, 0.0);
    double lanes[8] = {};
    for (int64_t i = block; i < end; i += 8) {
      for (int lane = 0; lane < 8; ++lane) lanes[lane] += weights[i + lane];
    }
    for (int width = 4; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    masses[block / kMassBlock] = lanes[0];
    total += lanes[0];
  }
  return total;
}

// A logit that at least `keep` reach: the keep-th largest among the maxima of about 2 · keep runs.
float Threshold(const float* logits, int64_t n, int64_t keep, float* maxima) {
  const int64_t vectors = (n + kLanes - 1) / kLanes;
  const int64_t runs = std::min(vectors, (2 * keep + kLanes - 1) / kLanes);
  for (int64_t run = 0; run < runs; ++run) {
    Lanes most = Set(kLowest);
    for (int64_t v = run * vectors / runs; v < (run + 1) * vectors / runs; ++v) {
      most = Max(LoadLogits(logits + v * kLanes, n - v * kLanes), most);
    }
    Store(most, maxima + run * kLanes);
  }
  std::nth_element(maxima, maxima + keep - 1, maxima + runs * kLanes, std::greater<float>());
  return maxima[keep - 1];
}

// packed[0 .. keep) = the `keep` largest logits, largest first. Room for n and 16 words.
void LargestLogits(const float* logits, int64_t n, int64_t keep, uint64_t* packed) {
  // A quarter of all would pass the threshold or more: take all.
  const float threshold = keep * 4 < n ? Threshold(logits, n, keep, reinterpret_cast<float*>(packed)) : kLowest;
  int64_t count = 0;
  if (threshold == kLowest) {
    for (; count < n; ++count) packed[count] = Packed(logits[count], count);
  } else {
    for (int64_t i = 0; i < n; i += kLanes) {
      const Lanes v = LoadLogits(logits + i, n - i);
      uint32_t reach = EqualBits(Max(v, Set(threshold)), v);
      for (; reach != 0; reach &= reach - 1) {
        const int64_t id = i + __builtin_ctz(reach);
        packed[count++] = Packed(logits[id], id);
      }
    }
  }
  if (keep < count) std::nth_element(packed, packed + keep - 1, packed + count, std::greater<uint64_t>());
  std::sort(packed, packed + keep, std::greater<uint64_t>());
}

// One thread's room for drawing from n logits.
struct DrawRoom {
  DrawRoom(Scratch& scratch, int64_t n) {
    weights = scratch.Get<double>(2 * n + n / kMassBlock + kBuckets + 64);
    masses = weights + n + 16;
    bucket_masses = masses + n / kMassBlock + 1;
    packed = reinterpret_cast<uint64_t*>(bucket_masses + kBuckets);
  }
  double* weights;
  double* masses;
  double* bucket_masses;
  uint64_t* packed;
};

// In id order: over blocks first, then within one.
int64_t DrawFromAll(const DrawRoom& room, int64_t n, double total, double u, int64_t fallback) {
  const double target = u * total;
  const int64_t blocks = (n + kMassBlock - 1) / kMassBlock;
  double sum = 0;
  int64_t block = 0;
  for (; block < blocks - 1 && sum + room.masses[block] <= target; ++block) sum += room.masses[block];
  Walk walk(target, sum, fallback);
  for (int64_t id = block * kMassBlock; id < n; ++id) {
    if (walk.Step(room.weights[id], id)) break;
  }
  return walk.choice();
}

// From the shortest prefix of the `count` sorted candidates whose mass reaches `wanted`; -1 if none does and there are more.
template <class WeightOf>
int64_t DrawFromPrefix(const DrawRoom& room, int64_t count, bool more, double wanted, double u, const WeightOf& weight_of) {
  double mass = 0;
  int64_t kept = 0;
  do {
    mass += weight_of(kept++);
  } while (kept < count && mass < wanted);
  if (more && mass < wanted) return -1;
  Walk walk(u * mass, 0, IdOf(room.packed[0]));
  for (int64_t r = 0; r < kept; ++r) {
    if (walk.Step(weight_of(r), IdOf(room.packed[r]))) break;
  }
  return walk.choice();
}

int64_t DrawFromTopK(const DrawRoom& room, const float* logits, int64_t n, float most, const SamplingSlot& slot, double u) {
  LargestLogits(logits, n, slot.top_k, room.packed);
  double total = 0;
  for (int64_t r = 0; r < slot.top_k; ++r) {
    const double logit = NanIsLowest(logits[IdOf(room.packed[r])]);
    total += room.weights[r] = std::exp((logit - most) / slot.temperature);
  }
  const double wanted = slot.top_p < 1 ? slot.top_p * total : std::numeric_limits<double>::infinity();
  return DrawFromPrefix(room, slot.top_k, false, wanted, u, [&](int64_t r) { return room.weights[r]; });
}

// All ids by falling weight without sorting them: by bucket, of which only those are sorted that something ends in.
class Buckets {
 public:
  Buckets(const DrawRoom& room, const float* logits, int64_t n, float most, double temperature)
      : room_(room), logits_(logits), n_(n), most_(most), scale_((kBuckets / 64) / temperature) {
    std::fill(room.bucket_masses, room.bucket_masses + kBuckets, 0.0);
    for (int64_t id = 0; id < n; ++id) room.bucket_masses[BucketOf(id)] += room.weights[id];
    while (room.bucket_masses[last_bucket_] == 0) --last_bucket_;
  }

  struct Place {
    int64_t id;
    double mass;  // of all up to this id, and it
  };
  // The first place where `past` holds of its mass; the last one with weight where that never comes.
  template <class Past>
  Place Find(const Past& past) const {
    Place last{};
    double before = 0;
    for (int64_t bucket = 0; bucket <= last_bucket_; ++bucket) {
      const double mass = room_.bucket_masses[bucket];
      if (bucket < last_bucket_ && !past(before + mass)) {
        before += mass;
        continue;
      }
      const int64_t count = Sort(bucket);
      for (int64_t rank = 0; rank < count; ++rank) {
        const int64_t id = IdOf(room_.packed[rank]);
        const double weight = room_.weights[id];
        if (weight > 0) last = {id, before + weight};
        before += weight;
        if (past(before)) return last;
      }
    }
    return last;
  }

 private:
  int64_t BucketOf(int64_t id) const {
    const double depth = (most_ - double{NanIsLowest(logits_[id])}) * scale_;
    return depth < kBuckets - 1 ? static_cast<int64_t>(depth) : kBuckets - 1;
  }
  int64_t Sort(int64_t bucket) const {
    int64_t count = 0;
    for (int64_t id = 0; id < n_; ++id) {
      if (BucketOf(id) == bucket) room_.packed[count++] = Packed(logits_[id], id);
    }
    std::sort(room_.packed, room_.packed + count, std::greater<uint64_t>());
    return count;
  }

  const DrawRoom& room_;
  const float* logits_;
  const int64_t n_;
  const double most_, scale_;
  int64_t last_bucket_ = kBuckets - 1;  // with mass
};

int64_t DrawFromTopP(const DrawRoom& room, const float* logits, int64_t n, float most, const SamplingSlot& slot, double u) {
  const double wanted = slot.top_p * MakeWeights(logits, n, most, slot.temperature, room.weights, room.masses);
  const int64_t few = std::min(kFew, n);
  LargestLogits(logits, n, few, room.packed);
  const auto weight_of = [&](int64_t r) { return room.weights[IdOf(room.packed[r])]; };
  const int64_t token = DrawFromPrefix(room, few, few < n, wanted, u, weight_of);
  if (token >= 0) return token;
  const Buckets buckets(room, logits, n, most, slot.temperature);
  const double mass = buckets.Find([&](double sum) { return sum >= wanted; }).mass;
  return buckets.Find([&](double sum) { return sum > u * mass; }).id;
}

int64_t Draw(Scratch& scratch, const float* logits, int64_t n, const Most& most, const SamplingSlot& slot) {
  if (!(slot.temperature > 0) || std::isinf(most.logit)) return most.id;  // infinite: there is no distribution
  const DrawRoom room(scratch, n);
  const double u = Uniform(slot.seed, slot.choice, slot.position);
  if (slot.top_k > 0 && slot.top_k < n) return DrawFromTopK(room, logits, n, most.logit, slot, u);
  if (slot.top_p < 1) return DrawFromTopP(room, logits, n, most.logit, slot, u);
  const double total = MakeWeights(logits, n, most.logit, slot.temperature, room.weights, room.masses);
  return DrawFromAll(room, n, total, u, most.id);
}

void Sample(Context& context, const SampleArgs& args) {
  const int64_t slots = args.logits.dim(0), n = args.logits.dim(1);
  context.pool.ParallelFor(slots, slots * n * 1.0, [&](int64_t s, int thread) {
    const float* logits = args.logits.data + s * n;
    const Most most = ArgMax(logits, n);
    const int64_t token = Draw(context.of_thread[thread], logits, n, most, args.slots(s));
    args.tokens(s) = static_cast<int32_t>(token);
    args.logprobs(s) = LogSoftmax(logits, n, most.logit, token);
  });
}

void TokenLogprob(Context& context, const TokenLogprobArgs& args) {
  const int64_t slots = args.logits.dim(0), n = args.logits.dim(1);
  context.pool.ParallelFor(slots, slots * n * 0.5, [&](int64_t s, int) {
    const int64_t target = args.targets(s);
    args.logprobs(s) = 0.0f;
    args.is_greedy(s) = 0;
    if (target < 0) return;
    const float* logits = args.logits.data + s * n;
    const Most most = ArgMax(logits, n);
    args.logprobs(s) = LogSoftmax(logits, n, most.logit, target);
    args.is_greedy(s) = most.id == target;
  });
}

void TopLogprobs(Context& context, const TopLogprobsArgs& args) {
  const int64_t slots = args.logits.dim(0), n = args.logits.dim(1), most_tokens = args.tokens.dim(1);
  context.pool.ParallelFor(slots, slots * n * 1.0, [&](int64_t s, int thread) {
    const int64_t count = args.counts(s);
    MEMSERVE_CHECK(0 <= count && count <= std::min(most_tokens, n));
    const float* logits = args.logits.data + s * n;
    int32_t* tokens = args.tokens.data + s * most_tokens;
    float* logprobs = args.logprobs.data + s * most_tokens;
    std::fill(tokens + count, tokens + most_tokens, -1);
    std::fill(logprobs + count, logprobs + most_tokens, 0.0f);
    const int64_t chosen = args.chosen.dim(1);
    if (count == 0 && chosen == 0) return;
    const float most = ArgMax(logits, n).logit;
    const double total = LogTotal(logits, n, most);
    const auto logprob = [&](int64_t id) { return static_cast<float>(double{NanIsLowest(logits[id])} - most - total); };
    if (count > 0) {
      uint64_t* packed = context.of_thread[thread].Get<uint64_t>(n + kLanes);
      LargestLogits(logits, n, count, packed);
      for (int64_t r = 0; r < count; ++r) {
        tokens[r] = static_cast<int32_t>(IdOf(packed[r]));
        logprobs[r] = logprob(tokens[r]);
      }
    }
    for (int64_t c = 0; c < chosen; ++c) {
      const int64_t id = args.chosen(s, c);
      MEMSERVE_CHECK(-1 <= id && id < n);
      args.chosen_logprobs(s, c) = id >= 0 ? logprob(id) : 0.0f;
    }
  });
}

}  // namespace memserve::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace memserve::kernels::cpu {

HWY_EXPORT(Sample);
HWY_EXPORT(TokenLogprob);
HWY_EXPORT(TopLogprobs);

void AddSampling(size_t index, Functions& functions) {
  functions.sample = HWY_DISPATCH_TABLE(Sample)[index];
  functions.token_logprob = HWY_DISPATCH_TABLE(TokenLogprob)[index];
  functions.top_logprobs = HWY_DISPATCH_TABLE(TopLogprobs)[index];
}

}  // namespace memserve::kernels::cpu
#endif
