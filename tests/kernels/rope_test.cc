#include "kernels/rope.h"

#include <cmath>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

class RopeTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(RopeTest);

// Position 1 turns pair 0 by a quarter and pair 1 by a half.
TEST_P(RopeTest, TurnsNeighboursOrHalves) {
  const DeviceTensor<int32_t, 1> positions(backend(), {1}, {1});
  const DeviceTensor<float, 2> cos(backend(), {2, 2}, {1, 1, 0, -1}), sin(backend(), {2, 2}, {0, 0, 1, 0});
  const DeviceTensor<float, 3> interleaved(backend(), {1, 1, 4}, {1, 2, 3, 4}), halves(backend(), {1, 1, 4}, {1, 2, 3, 4});
  backend().Rope({.x = interleaved, .positions = positions, .cos = cos, .sin = sin, .pairing = RopePairing::kInterleaved});
  backend().Rope({.x = halves, .positions = positions, .cos = cos, .sin = sin, .pairing = RopePairing::kHalves});
  EXPECT_EQ(interleaved.Read(), (std::vector<float>{-2, 1, -3, -4}));
  EXPECT_EQ(halves.Read(), (std::vector<float>{-3, -2, 1, -4}));
}

TEST_P(RopeTest, LeavesTheRestOfAHeadAsItIs) {
  const DeviceTensor<int32_t, 1> positions(backend(), {1}, {0});
  const DeviceTensor<float, 2> cos(backend(), {1, 1}, {0}), sin(backend(), {1, 1}, {1});
  const DeviceTensor<float, 3> interleaved(backend(), {1, 2, 5}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10});
  const DeviceTensor<float, 3> halves(backend(), {1, 2, 5}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10});
  backend().Rope({.x = interleaved, .positions = positions, .cos = cos, .sin = sin, .pairing = RopePairing::kInterleaved});
  backend().Rope({.x = halves, .positions = positions, .cos = cos, .sin = sin, .pairing = RopePairing::kHalves});
  EXPECT_EQ(interleaved.Read(), (std::vector<float>{-2, 1, 3, 4, 5, -7, 6, 8, 9, 10}));
  EXPECT_EQ(halves.Read(), (std::vector<float>{-2, 1, 3, 4, 5, -7, 6, 8, 9, 10}));
}

TEST_P(RopeTest, TurnsEveryElementOnItsOwn) {
  constexpr int64_t kPositions = 50;
  for (RopePairing pairing : {RopePairing::kInterleaved, RopePairing::kHalves}) {
    for (int64_t num_tokens : {0, 1, 3, 8}) {
      for (int64_t heads : {1, 3}) {
        for (auto [head_dim, half_dim] : {std::pair<int64_t, int64_t>{1, 0},
                                          {2, 1},
                                          {3, 1},
                                          {8, 4},
                                          {20, 10},
                                          {20, 7},
                                          {32, 16},
                                          {64, 32},
                                          {64, 20},
                                          {128, 64}}) {
          const std::vector<float> x = Reals(1, num_tokens * heads * head_dim);
          const std::vector<float> cos = Reals(2, kPositions * half_dim), sin = Reals(3, kPositions * half_dim);
          std::vector<int32_t> positions = Indices(4, num_tokens, 0, kPositions - 1);
          if (num_tokens > 0) positions[0] = kPositions - 1;
          const DeviceTensor<float, 3> device_x(backend(), {num_tokens, heads, head_dim}, x);
          backend().Rope({.x = device_x,
                          .positions = DeviceTensor<int32_t, 1>(backend(), {num_tokens}, positions),
                          .cos = DeviceTensor<float, 2>(backend(), {kPositions, half_dim}, cos),
                          .sin = DeviceTensor<float, 2>(backend(), {kPositions, half_dim}, sin),
                          .pairing = pairing});
          std::vector<float> expected = x;
          std::vector<double> tolerance(x.size(), 0);
          for (int64_t th = 0; th < num_tokens * heads; ++th) {
            for (int64_t i = 0; i < half_dim; ++i) {
              const bool interleaved = pairing == RopePairing::kInterleaved;
              const int64_t at_a = th * head_dim + (interleaved ? 2 * i : i);
              const int64_t at_b = th * head_dim + (interleaved ? 2 * i + 1 : i + half_dim);
              const double a = x[at_a], b = x[at_b];
              const double c = cos[positions[th / heads] * half_dim + i], s = sin[positions[th / heads] * half_dim + i];
              expected[at_a] = a * c - b * s;
              expected[at_b] = a * s + b * c;
              tolerance[at_a] = 2 * kEpsilon * (std::abs(a * c) + std::abs(b * s));
              tolerance[at_b] = 2 * kEpsilon * (std::abs(a * s) + std::abs(b * c));
            }
          }
          EXPECT_TRUE(Near(device_x.Read(), expected, tolerance, device_x.shape()))
              << num_tokens << " tokens, head_dim " << head_dim << ", half_dim " << half_dim;
        }
      }
    }
  }
}

// The place of an element in a vector register must not show: equal pairs and angles give equal bits everywhere.
TEST_P(RopeTest, GivesEqualElementsEqualBits) {
  constexpr int64_t kTokens = 5, kHeads = 3, kHalfDim = 21, kHeadDim = 2 * kHalfDim;
  const DeviceTensor<int32_t, 1> positions(backend(), {kTokens}, std::vector<int32_t>(kTokens, 0));
  const DeviceTensor<float, 2> cos(backend(), {1, kHalfDim}, std::vector<float>(kHalfDim, 0.1f));
  const DeviceTensor<float, 2> sin(backend(), {1, kHalfDim}, std::vector<float>(kHalfDim, 0.7f));
  std::vector<float> x;
  for (int64_t i = 0; i < kTokens * kHeads * kHalfDim; ++i) x.insert(x.end(), {0.3f, -1.7f});
  const DeviceTensor<float, 3> device_x(backend(), {kTokens, kHeads, kHeadDim}, x);
  backend().Rope({.x = device_x, .positions = positions, .cos = cos, .sin = sin});
  const std::vector<float> turned = device_x.Read();
  for (size_t i = 0; i < turned.size(); ++i) EXPECT_EQ(turned[i], turned[i % 2]) << "element " << i;
}

}  // namespace
}  // namespace memserve::kernels
