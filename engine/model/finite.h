// Finding NaN and infinity in weights while they are still in the cache from being read.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace memserve::engine {

// How many of `count` values of type f32, bf16 or f16 are NaN or infinite; 0 for other types.
int64_t CountNotFinite(kernels::DType dtype, const void* values, int64_t count);

}  // namespace memserve::engine
