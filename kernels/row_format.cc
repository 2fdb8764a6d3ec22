#include "kernels/row_format.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace memserve::kernels {
namespace {

int Nibble(const uint8_t* row, int64_t c) { return row[c / 2] >> (c % 2 * 4) & 15; }

void Decode(const void* row, DType format, float scale, int64_t columns, float* out) {
  switch (format) {
    case DType::kF32:
      std::memcpy(out, row, columns * sizeof(float));
      break;
    case DType::kBF16:
      for (int64_t c = 0; c < columns; ++c) out[c] = ToFloat(static_cast<const BFloat16*>(row)[c]);
      break;
    case DType::kI8:
      for (int64_t c = 0; c < columns; ++c) out[c] = scale * static_cast<float>(static_cast<const int8_t*>(row)[c]);
      break;
    case DType::kI4:
      for (int64_t c = 0; c < columns; ++c) out[c] = scale * static_cast<float>(Nibble(static_cast<const uint8_t*>(row), c) - 8);
      break;
    default:
      MEMSERVE_CHECK(false);
  }
}

float LargestMagnitude(const float* values, int64_t count) {
  float largest = 0;
  for (int64_t c = 0; c < count; ++c) largest = std::max(largest, std::abs(values[c]));
  return largest;
}

// Rounds to nearest, ties to even, without a call: what is added leaves no room for a fraction. NaN becomes -most.
int8_t Code(float value, float scale, float most) {
  constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23
  float q = value / scale;
  q = q > -most ? q : -most;
  q = q < most ? q : most;
  return static_cast<int8_t>((q + kMagic) - kMagic);
}

// Columns [first, end) of a row of `columns` values; gives its scale.
float Encode(const float* values, int64_t columns, int64_t first, int64_t end, DType format, void* out) {
  if (format == DType::kF32) {
    std::memcpy(out, values + first, (end - first) * sizeof(float));
    return 1;
  }
  if (format == DType::kBF16) {
    for (int64_t c = first; c < end; ++c) static_cast<BFloat16*>(out)[c - first] = ToBFloat16(values[c]);
    return 1;
  }
  const float most = format == DType::kI8 ? 127 : 7;
  const float scale = LargestMagnitude(values, columns) / most;
  const float divisor = scale > 0 ? scale : 1;
  if (format == DType::kI8) {
    for (int64_t c = first; c < end; ++c) static_cast<int8_t*>(out)[c - first] = Code(values[c], divisor, most);
    return scale;
  }
  auto* bytes = static_cast<uint8_t*>(out);
  for (int64_t c = first; c < end; c += 2) {
    const int low = Code(values[c], divisor, most) + 8;
    const int high = c + 1 < end ? Code(values[c + 1], divisor, most) + 8 : 8;
    *bytes++ = static_cast<uint8_t>(low | high << 4);
  }
  return scale;
}

}  // namespace

float CodeAt(const void* row, DType format, int64_t c) {
  switch (format) {
    case DType::kF32:
      return static_cast<const float*>(row)[c];
    case DType::kBF16:
      return ToFloat(static_cast<const BFloat16*>(row)[c]);
    case DType::kI8:
      return static_cast<const int8_t*>(row)[c];
    default:
      MEMSERVE_CHECK(format == DType::kI4);
      return static_cast<float>(Nibble(static_cast<const uint8_t*>(row), c) - 8);
  }
}

void ConvertRows(const SourceRows& from, int64_t count, int64_t first, int64_t end, DType to, void* out, float* out_scales) {
  MEMSERVE_CHECK(IsRowFormat(from.format) && IsRowFormat(to));
  MEMSERVE_CHECK(0 <= first && first <= end && end <= from.columns);
  MEMSERVE_CHECK(to != DType::kI4 || first % 2 == 0);
  MEMSERVE_CHECK(!HasScales(from.format) || from.scales != nullptr || count == 0);
  const int64_t from_bytes = RowBytes(from.format, from.columns), to_bytes = RowBytes(to, end - first);
  std::vector<float> values(from.format == to ? 0 : from.columns);
  for (int64_t r = 0; r < count; ++r) {
    const char* row = static_cast<const char*>(from.rows) + r * from_bytes;
    char* place = static_cast<char*>(out) + r * to_bytes;
    if (from.format == to) {
      std::memcpy(place, row + RowBytes(to, first), to_bytes);
      if (HasScales(to)) out_scales[r] = from.scales[r];
      continue;
    }
    Decode(row, from.format, HasScales(from.format) ? from.scales[r] : 1, from.columns, values.data());
    const float scale = Encode(values.data(), from.columns, first, end, to, place);
    if (HasScales(to)) out_scales[r] = scale;
  }
}

}  // namespace memserve::kernels
