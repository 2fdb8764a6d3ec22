// CHECK for what only we can get wrong (shapes, ranges, null): prints the place, the condition and the values, then aborts.
// What a client, a file or the machine can get wrong is an absl::Status instead.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace memserve::kernels {

[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, condition);
  std::abort();
}

[[noreturn]] inline void CheckEqFailed(const char* file, int line, const char* condition, int64_t a, int64_t b) {
  std::fprintf(stderr, "%s:%d: check failed: %s (%lld against %lld)\n", file, line, condition, static_cast<long long>(a),
               static_cast<long long>(b));
  std::abort();
}

}  // namespace memserve::kernels

#define MEMSERVE_CHECK(condition) \
  ((condition) ? (void)0 : ::memserve::kernels::CheckFailed(__FILE__, __LINE__, #condition))
#define MEMSERVE_CHECK_EQ(a, b) \
  ((a) == (b) ? (void)0 : ::memserve::kernels::CheckEqFailed(__FILE__, __LINE__, #a " == " #b, (a), (b)))
