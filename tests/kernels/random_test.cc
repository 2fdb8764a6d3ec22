#include "kernels/random.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

namespace memserve::kernels {
namespace {

using testing::ElementsAre;

// Known answers of philox4x32 with 10 rounds, from Random123's kat_vectors.
TEST(PhiloxTest, GivesTheKnownAnswers) {
  EXPECT_THAT(Philox({0, 0, 0, 0}, {0, 0}), ElementsAre(0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u));
  EXPECT_THAT(Philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}), ElementsAre(0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu));
  EXPECT_THAT(Philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
              ElementsAre(0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u));
}

TEST(UniformTest, IsTheFirstBitsOfOneBlock) {
  EXPECT_EQ(Uniform(0, 0, 0), static_cast<double>(0x6627e8d5e169c58dull >> 11) * 0x1p-53);
}

TEST(UniformTest, DependsOnEachOfSeedChoiceAndPosition) {
  std::set<double> draws;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32, ~uint64_t{0}}) {
    for (uint32_t choice : {0u, 1u, 7u}) {
      for (uint32_t position : {0u, 1u, 2u, 4096u}) draws.insert(Uniform(seed, choice, position));
    }
  }
  EXPECT_EQ(draws.size(), 4u * 3 * 4);
}

TEST(UniformTest, StaysBelowOneAndIsSpreadEvenly) {
  constexpr int kDraws = 20000, kBins = 16;
  int count[kBins] = {};
  for (int position = 0; position < kDraws; ++position) {
    const double u = Uniform(42, 0, position);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    ++count[static_cast<int>(u * kBins)];
  }
  double chi_square = 0;
  for (int n : count) chi_square += (n - kDraws / kBins) * (n - kDraws / kBins) / (double{kDraws} / kBins);
  EXPECT_LT(chi_square, 37.7);  // 15 degrees of freedom: exceeded once in a thousand
}

}  // namespace
}  // namespace memserve::kernels
