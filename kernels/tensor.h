// A view of a dense row-major tensor: a pointer and a shape. It owns nothing. The pointer may be a device address: only the
// back end that allocated it may read through it, and only on the host back ends does operator() make sense.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/check.h"

namespace memserve::kernels {

// A bfloat16 as stored: the upper half of an IEEE float32.
struct BFloat16 {
  uint16_t bits;
};

inline float ToFloat(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline float ToFloat(float value) { return value; }

// Rounds to nearest, ties to even; NaN stays NaN.
inline BFloat16 ToBFloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// An IEEE half as stored.
struct Float16 {
  uint16_t bits;
};

// Exact: every half is a float.
inline float ToFloat(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  const uint32_t exponent = rest >> 10;
  uint32_t bits = rest << 13;
  float out;
  if (exponent == 0) {  // zero or subnormal: rest · 2⁻²⁴
    out = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &out, sizeof(bits));
  } else {
    bits += exponent == 31 ? (255u - 31u) << 23 : (127u - 15u) << 23;
  }
  bits |= sign;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// kI4: two's complement nibbles would waste a code; a nibble holds value + 8 (see row_format.h).
enum class DType : uint8_t { kF32, kBF16, kF16, kI32, kI64, kI8, kU8, kI4 };

// Of one element in bytes. Not for kI4, two of which share a byte: see RowBytes.
constexpr int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kI4:
      MEMSERVE_CHECK(false);
    case DType::kI8:
    case DType::kU8:
      return 1;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kI64:
      return 8;
    default:
      return 4;
  }
}

constexpr const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kI8:
      return "int8";
    case DType::kU8:
      return "u8";
    case DType::kI4:
      return "int4";
  }
  return "?";
}

template <typename T, int rank>
struct TensorView {
  T* data = nullptr;
  std::array<int64_t, rank> shape{};

  TensorView() = default;
  TensorView(T* data_in, std::array<int64_t, rank> shape_in) : data(data_in), shape(shape_in) {}
  // A view to change is also a view to read.
  template <typename U = T, typename = std::enable_if_t<std::is_const_v<U>>>
  TensorView(const TensorView<std::remove_const_t<T>, rank>& other)  // NOLINT(google-explicit-constructor)
      : data(other.data), shape(other.shape) {}

  int64_t dim(int i) const { return shape[i]; }
  int64_t size() const {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    return n;
  }
  bool empty() const { return size() == 0; }
  explicit operator bool() const { return data != nullptr; }

  template <typename... Index>
  T& operator()(Index... index) const {
    static_assert(sizeof...(Index) == rank);
    const std::array<int64_t, rank> at{static_cast<int64_t>(index)...};
    int64_t offset = 0;
    for (int i = 0; i < rank; ++i) offset = offset * shape[i] + at[i];
    return data[offset];
  }
};

}  // namespace memserve::kernels
