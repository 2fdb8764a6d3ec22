#include "kernels/tensor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace memserve::kernels {
namespace {

TEST(BFloat16Test, RoundsToNearestWithTiesToEven) {
  EXPECT_EQ(ToBFloat16(1.0f).bits, 0x3f80);
  EXPECT_EQ(ToBFloat16(1.0f + 0x1p-9f).bits, 0x3f80);             // below half a step
  EXPECT_EQ(ToBFloat16(1.0f + 0x1p-8f).bits, 0x3f80);             // half a step: to even, down
  EXPECT_EQ(ToBFloat16(1.0f + 0x1p-8f + 0x1p-20f).bits, 0x3f81);  // just above
  EXPECT_EQ(ToBFloat16(1.0f + 0x1p-7f + 0x1p-8f).bits, 0x3f82);   // half a step: to even, up
  EXPECT_EQ(ToBFloat16(-1.0f - 0x1p-7f - 0x1p-8f).bits, 0xbf82);
}

TEST(BFloat16Test, KeepsInfinityAndNanAndOverflowsToInfinity) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(ToFloat(ToBFloat16(infinity)), infinity);
  EXPECT_EQ(ToFloat(ToBFloat16(-infinity)), -infinity);
  EXPECT_EQ(ToFloat(ToBFloat16(std::numeric_limits<float>::max())), infinity);
  EXPECT_TRUE(std::isnan(ToFloat(ToBFloat16(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_TRUE(std::isnan(ToFloat(ToBFloat16(std::numeric_limits<float>::signaling_NaN()))));
}

TEST(BFloat16Test, EveryValueSurvivesTheWayToFloatAndBack) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const BFloat16 value{static_cast<uint16_t>(bits)};
    if (std::isnan(ToFloat(value))) continue;
    EXPECT_EQ(ToBFloat16(ToFloat(value)).bits, value.bits);
  }
}

TEST(TensorViewTest, IsRowMajor) {
  int values[] = {0, 1, 2, 3, 4, 5};
  const TensorView<int, 2> view(values, {2, 3});
  EXPECT_EQ(view(0, 2), 2);
  EXPECT_EQ(view(1, 0), 3);
  EXPECT_EQ(view.size(), 6);
  const TensorView<const int, 2> same = view;
  EXPECT_EQ(same(1, 2), 5);
}

TEST(TensorViewTest, WithoutRowsIsEmpty) {
  EXPECT_TRUE((TensorView<int, 2>(nullptr, {0, 3}).empty()));
  EXPECT_FALSE((TensorView<int, 2>()));
}

}  // namespace
}  // namespace memserve::kernels
