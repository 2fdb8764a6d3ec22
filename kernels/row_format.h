// How the rows of a value table are stored.
//
//   f32, bf16   the values
//   int8        codes q in [-127, 127], one byte each                     value = scale[row] · q
//   int4        codes q in [-7, 7], two to a byte as q + 8: the even       value = scale[row] · q
//               column in the low nibble, the odd one in the high nibble
//
// A row has one scale, symmetric, computed from the whole row (also where a store keeps a part of its columns): the largest magnitude
// divided by 127 or 7; a row of zeros has scale 0. q is value / scale rounded to nearest, ties to even.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace memserve::kernels {

constexpr bool HasScales(DType format) { return format == DType::kI8 || format == DType::kI4; }

constexpr bool IsRowFormat(DType format) {
  return format == DType::kF32 || format == DType::kBF16 || format == DType::kI8 || format == DType::kI4;
}

// Of `columns` columns of one row.
constexpr int64_t RowBytes(DType format, int64_t columns) {
  return format == DType::kI4 ? (columns + 1) / 2 : columns * SizeOf(format);
}

// Columns in 16 bytes: the unit in which a table is split over devices.
constexpr int64_t ColumnsOf16Bytes(DType format) { return format == DType::kI4 ? 32 : 16 / SizeOf(format); }

// Column c of a row as a float: its value, or its code where the format has scales.
float CodeAt(const void* row, DType format, int64_t c);

// A run of whole rows, `columns` columns each, without gaps. `scales`: one a row where the format has them.
struct SourceRows {
  const void* rows = nullptr;
  DType format = DType::kF32;
  const float* scales = nullptr;
  int64_t columns = 0;
};

// Columns [first, end) of `count` rows in another format (or the same). `first` is even where `to` is int4.
void ConvertRows(const SourceRows& from, int64_t count, int64_t first, int64_t end, DType to, void* out, float* out_scales);

}  // namespace memserve::kernels
