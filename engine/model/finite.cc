#include "engine/model/finite.h"

#include <algorithm>
#include <cstring>

namespace memserve::engine {
namespace {

// A value is NaN or infinite if all bits of its exponent are set. Adding the exponent's lowest bit then carries into the place
// above it, for all values of a 64-bit word at once.
struct Exponents {
  uint64_t mask, lowest, carry;
};
constexpr Exponents kF32 = {0x7f8000007f800000, 0x0080000000800000, 0x8000000080000000};
constexpr Exponents kBF16 = {0x7f807f807f807f80, 0x0080008000800080, 0x8000800080008000};
constexpr Exponents kF16 = {0x7c007c007c007c00, 0x0400040004000400, 0x8000800080008000};

int64_t CountInWord(const Exponents& e, uint64_t word) { return __builtin_popcountll(((word & e.mask) + e.lowest) & e.carry); }

using UnalignedWord = uint64_t __attribute__((aligned(1), may_alias));

int64_t Count(const Exponents e, const char* bytes, int64_t size) {
  constexpr int kRun = 64;  // words; a fixed number, so that the compiler makes vectors of them
  int64_t found = 0, at = 0;
  constexpr int64_t kRunBytes = kRun * sizeof(uint64_t);
  for (; at + kRunBytes <= size; at += kRunBytes) {
    const UnalignedWord* words = reinterpret_cast<const UnalignedWord*>(bytes + at);
    uint64_t any = 0;
    for (int i = 0; i < kRun; ++i) any |= (words[i] & e.mask) + e.lowest;
    if ((any & e.carry) == 0) continue;
    for (int i = 0; i < kRun; ++i) found += CountInWord(e, words[i]);
  }
  for (; at < size; at += sizeof(uint64_t)) {
    uint64_t word = 0;  // zeroes are finite
    std::memcpy(&word, bytes + at, std::min<int64_t>(sizeof(word), size - at));
    found += CountInWord(e, word);
  }
  return found;
}

}  // namespace

int64_t CountNotFinite(kernels::DType dtype, const void* values, int64_t count) {
  const char* bytes = static_cast<const char*>(values);
  switch (dtype) {
    case kernels::DType::kF32:
      return Count(kF32, bytes, count * 4);
    case kernels::DType::kBF16:
      return Count(kBF16, bytes, count * 2);
    case kernels::DType::kF16:
      return Count(kF16, bytes, count * 2);
    default:
      return 0;
  }
}

}  // namespace memserve::engine
