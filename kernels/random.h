// Counter-based random numbers: the same on every back end, needing no state.
// Source: Philox4x32-10, Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., SC 2011).
#pragma once

#include <array>
#include <cstdint>

namespace memserve::kernels {

// One Philox4x32 block of 10 rounds.
constexpr std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in [0, 1) with 53 bits, keyed by (seed, choice, position) and nothing else.
constexpr double Uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  const std::array<uint32_t, 4> r = Philox({position, choice, 0, 0}, {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const uint64_t bits = (static_cast<uint64_t>(r[0]) << 32 | r[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace memserve::kernels
