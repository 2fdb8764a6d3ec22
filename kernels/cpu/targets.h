// The instruction sets that the SIMD units are compiled for.
#pragma once

// SSE has no fused multiply-add; machines without AVX2 take the scalar path.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)

#include "hwy/targets.h"

namespace memserve::kernels::cpu {

// Where HWY_EXPORT put the version for `target` in its table.
inline size_t TableIndex([[maybe_unused]] int64_t target) {
#if (HWY_TARGETS & (HWY_TARGETS - 1)) == 0
  return 0;
#else
  hwy::ChosenTarget chosen;
  chosen.Update(target);
  return chosen.GetIndex();
#endif
}

}  // namespace memserve::kernels::cpu
