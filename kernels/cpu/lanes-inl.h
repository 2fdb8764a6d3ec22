// Sixteen float lanes, whatever the vector length: one register of AVX-512, two of AVX2, sixteen plain floats. All kernels are
// written on them, so every instruction set adds the same numbers in the same order.
#if defined(MEMSERVE_KERNELS_CPU_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MEMSERVE_KERNELS_CPU_LANES_INL_H_
#undef MEMSERVE_KERNELS_CPU_LANES_INL_H_
#else
#define MEMSERVE_KERNELS_CPU_LANES_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "hwy/highway.h"
#include "kernels/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace memserve::kernels::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline constexpr int kLanes = 16;

using FloatTag = hn::CappedTag<float, kLanes>;
using IntTag = hn::RebindToSigned<FloatTag>;
using WordTag = hn::RebindToUnsigned<FloatTag>;
using HalfWordTag = hn::Rebind<uint16_t, FloatTag>;
using FloatVec = hn::Vec<FloatTag>;
using IntVec = hn::Vec<IntTag>;
using WordVec = hn::Vec<WordTag>;

inline constexpr int kPart = static_cast<int>(hn::MaxLanes(FloatTag()));
inline constexpr int kParts = kLanes / kPart;

struct Lanes {
  FloatVec part[kParts];
};

struct LaneMask {
  hn::Mask<FloatTag> part[kParts];
};

// Applies a function to each part; unrolled.
#define MEMSERVE_PARTS(p) for (int p = 0; p < kParts; ++p)

HWY_INLINE FloatVec FusedMulAdd(FloatVec a, FloatVec b, FloatVec c) {
#if HWY_TARGET == HWY_SCALAR
  return FloatVec(std::fma(a.raw, b.raw, c.raw));
#else
  return hn::MulAdd(a, b, c);
#endif
}

HWY_INLINE Lanes Set(float value) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = hn::Set(FloatTag(), value);
  return out;
}
HWY_INLINE Lanes Zero() { return Set(0.0f); }

HWY_INLINE Lanes Load(const float* from) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = hn::LoadU(FloatTag(), from + p * kPart);
  return out;
}
HWY_INLINE Lanes Load(const BFloat16* from) {
  Lanes out;
  MEMSERVE_PARTS(p) {
    const auto halves = hn::LoadU(HalfWordTag(), reinterpret_cast<const uint16_t*>(from) + p * kPart);
    out.part[p] = hn::BitCast(FloatTag(), hn::ShiftLeft<16>(hn::PromoteTo(WordTag(), halves)));
  }
  return out;
}
// Values 0, 2, … 30 and 1, 3, … 31 of 32: two instructions fewer than in their order.
HWY_INLINE Lanes LoadEven(const BFloat16* from) {
  Lanes out;
  MEMSERVE_PARTS(p) {
    const WordVec words = hn::LoadU(WordTag(), reinterpret_cast<const uint32_t*>(from) + p * kPart);
    out.part[p] = hn::BitCast(FloatTag(), hn::ShiftLeft<16>(words));
  }
  return out;
}
HWY_INLINE Lanes LoadOdd(const BFloat16* from) {
  Lanes out;
  MEMSERVE_PARTS(p) {
    const WordVec words = hn::LoadU(WordTag(), reinterpret_cast<const uint32_t*>(from) + p * kPart);
    out.part[p] = hn::BitCast(FloatTag(), hn::And(words, hn::Set(WordTag(), 0xffff0000u)));
  }
  return out;
}
HWY_INLINE Lanes Load(const int8_t* from) {
  Lanes out;
  MEMSERVE_PARTS(p) {
    const auto bytes = hn::LoadU(hn::Rebind<int8_t, FloatTag>(), from + p * kPart);
    out.part[p] = hn::ConvertTo(FloatTag(), hn::PromoteTo(IntTag(), bytes));
  }
  return out;
}
// The codes -8 to 7 of the low nibbles (columns 0, 2, … 30 of an int4 row) and of the high ones (1, 3, … 31) of sixteen bytes.
HWY_INLINE void LoadNibbles(const uint8_t* from, Lanes& even, Lanes& odd) {
  MEMSERVE_PARTS(p) {
    const IntVec bytes = hn::PromoteTo(IntTag(), hn::LoadU(hn::Rebind<uint8_t, FloatTag>(), from + p * kPart));
    const IntVec eight = hn::Set(IntTag(), 8);
    even.part[p] = hn::ConvertTo(FloatTag(), hn::Sub(hn::And(bytes, hn::Set(IntTag(), 15)), eight));
    odd.part[p] = hn::ConvertTo(FloatTag(), hn::Sub(hn::ShiftRight<4>(bytes), eight));
  }
}
// Even and odd values back in order, and the other way round: 32 floats.
HWY_INLINE void StoreEvenOdd(const Lanes& even, const Lanes& odd, float* to) {
  MEMSERVE_PARTS(p) hn::StoreInterleaved2(even.part[p], odd.part[p], FloatTag(), to + 2 * p * kPart);
}
HWY_INLINE void LoadEvenOdd(const float* from, Lanes& even, Lanes& odd) {
  MEMSERVE_PARTS(p) hn::LoadInterleaved2(FloatTag(), from + 2 * p * kPart, even.part[p], odd.part[p]);
}

HWY_INLINE void Store(const Lanes& a, float* to) { MEMSERVE_PARTS(p) hn::StoreU(a.part[p], FloatTag(), to + p * kPart); }

HWY_INLINE LaneMask FirstLanes(int64_t count) {
  LaneMask out;
  MEMSERVE_PARTS(p) { out.part[p] = hn::FirstN(FloatTag(), static_cast<size_t>(std::clamp<int64_t>(count - p * kPart, 0, kPart))); }
  return out;
}
// Lanes from `count` on read nothing and are zero.
HWY_INLINE Lanes LoadFirst(const float* from, int64_t count) {
  if (count >= kLanes) return Load(from);
#if HWY_TARGET == HWY_SCALAR  // whose MaskedLoad reads what it masks out
  float v[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return Load(v);
#else
  const LaneMask mask = FirstLanes(count);
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = hn::MaskedLoad(mask.part[p], FloatTag(), from + p * kPart);
  return out;
#endif
}
HWY_INLINE void StoreFirst(const Lanes& a, float* to, int64_t count) {
  if (count >= kLanes) return Store(a, to);
  const LaneMask mask = FirstLanes(count);
  MEMSERVE_PARTS(p) hn::BlendedStore(a.part[p], mask.part[p], FloatTag(), to + p * kPart);
}

// a · b + c, rounded once.
HWY_INLINE Lanes MulAdd(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = FusedMulAdd(a.part[p], b.part[p], c.part[p]);
  return out;
}
HWY_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = hn::Add(a.part[p], b.part[p]);
  return out;
}
HWY_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = hn::Sub(a.part[p], b.part[p]);
  return out;
}
HWY_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = hn::Mul(a.part[p], b.part[p]);
  return out;
}
HWY_INLINE Lanes operator/(const Lanes& a, const Lanes& b) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = hn::Div(a.part[p], b.part[p]);
  return out;
}
// The larger; b where a is NaN.
HWY_INLINE Lanes Max(const Lanes& a, const Lanes& b) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = hn::IfThenElse(hn::Gt(a.part[p], b.part[p]), a.part[p], b.part[p]);
  return out;
}
HWY_INLINE Lanes Select(const LaneMask& mask, const Lanes& yes, const Lanes& no) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = hn::IfThenElse(mask.part[p], yes.part[p], no.part[p]);
  return out;
}
// Bit i: lane i of a equals that of b.
HWY_INLINE uint32_t EqualBits(const Lanes& a, const Lanes& b) {
  uint32_t out = 0;
  MEMSERVE_PARTS(p) {
    uint8_t bits[8] = {};
    hn::StoreMaskBits(FloatTag(), hn::Eq(a.part[p], b.part[p]), bits);
    out |= (static_cast<uint32_t>(bits[0]) | static_cast<uint32_t>(bits[1]) << 8) << (p * kPart);
  }
  return out;
}

// Lanes i and i + 8 first, then 4, 2, 1 apart.
HWY_INLINE float Sum(const Lanes& a) {
  alignas(64) float v[kLanes];
  Store(a, v);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  }
  return v[0];
}
HWY_INLINE float LargestOf(const Lanes& a) {
  alignas(64) float v[kLanes];
  Store(a, v);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) v[i] = v[i] > v[i + step] ? v[i] : v[i + step];
  }
  return v[0];
}

// To nearest bfloat16, ties to even, NaN stays NaN: ToBFloat16 on lanes.
HWY_INLINE Lanes RoundToBFloat16(const Lanes& a) {
  const WordTag w;
  Lanes out;
  MEMSERVE_PARTS(p) {
    const WordVec bits = hn::BitCast(w, a.part[p]);
    const WordVec odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(w, 1u));
    const WordVec rounded = hn::Add(bits, hn::Add(odd, hn::Set(w, 0x7fffu)));
    const WordVec nan = hn::Or(bits, hn::Set(w, 0x400000u));
    const WordVec chosen = hn::IfThenElse(hn::RebindMask(w, hn::Eq(a.part[p], a.part[p])), rounded, nan);
    out.part[p] = hn::BitCast(FloatTag(), hn::And(chosen, hn::Set(w, 0xffff0000u)));
  }
  return out;
}

// e^x within 1 ulp or so (2 for results below the normal range): x = n·ln 2 + r, a polynomial in r, scaled by 2ⁿ in two steps
// so that results run into 0 and infinity as they should.
HWY_INLINE FloatVec Exp(FloatVec x) {
  const FloatTag f;
  const IntTag i;
  const FloatVec bounded = hn::Min(hn::Max(x, hn::Set(f, -105.0f)), hn::Set(f, 89.0f));
  // Adding 1.5·2²³ rounds to the nearest whole number and leaves it in the low bits.
  const FloatVec magic = hn::Set(f, 12582912.0f);
  const FloatVec shifted = FusedMulAdd(bounded, hn::Set(f, 1.44269504f), magic);
  const FloatVec n = hn::Sub(shifted, magic);
  FloatVec r = FusedMulAdd(n, hn::Set(f, -0.693359375f), bounded);
  r = FusedMulAdd(n, hn::Set(f, 2.12194440e-4f), r);
  FloatVec y = hn::Set(f, 1.9875691500e-4f);
  y = FusedMulAdd(y, r, hn::Set(f, 1.3981999507e-3f));
  y = FusedMulAdd(y, r, hn::Set(f, 8.3334519073e-3f));
  y = FusedMulAdd(y, r, hn::Set(f, 4.1665795894e-2f));
  y = FusedMulAdd(y, r, hn::Set(f, 1.6666665459e-1f));
  y = FusedMulAdd(y, r, hn::Set(f, 5.0000001201e-1f));
  y = FusedMulAdd(hn::Mul(y, r), r, r);
  y = hn::Add(y, hn::Set(f, 1.0f));
  const IntVec power = hn::Sub(hn::BitCast(i, shifted), hn::Set(i, 0x4b400000));
  const IntVec half = hn::ShiftRight<1>(power);
  const auto two_to = [&](IntVec e) HWY_ATTR { return hn::BitCast(f, hn::ShiftLeft<23>(hn::Add(e, hn::Set(i, 127)))); };
  y = hn::Mul(hn::Mul(y, two_to(half)), two_to(hn::Sub(power, half)));
  return hn::IfThenElse(hn::Eq(x, x), y, x);
}
HWY_INLINE Lanes Exp(const Lanes& x) {
  Lanes out;
  MEMSERVE_PARTS(p) out.part[p] = Exp(x.part[p]);
  return out;
}

// 1 / (1 + e^−x).
HWY_INLINE Lanes Sigmoid(const Lanes& x) {
  const Lanes one = Set(1.0f);
  return one / (one + Exp(Zero() - x));
}

}  // namespace memserve::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // MEMSERVE_KERNELS_CPU_LANES_INL_H_
