// What this machine allows, measured here and now: no operation can be faster than reading its bytes and doing its sums.
#pragma once

#include <cstdint>

namespace memserve::bench {

struct Limits {
  double read_bytes_per_second = 0;  // sequential, huge pages
  double flops_per_second = 0;       // fused multiply-adds of float32, counted as two
};

Limits MeasureLimits(int threads);

}  // namespace memserve::bench
