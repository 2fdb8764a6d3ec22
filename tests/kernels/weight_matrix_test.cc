#include "kernels/weight_matrix.h"

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

class WeightMatrixTest : public ContractTest {
 protected:
  // Row `row` of the matrix as held, through Embedding.
  std::vector<float> Row(const WeightMatrix& weights, int32_t row) {
    const DeviceTensor<int32_t, 1> token_ids(backend(), {1}, {row}), from_slot(backend(), {1}, {-1});
    const DeviceTensor<float, 2> out(backend(), {1, weights.spec().k});
    backend().Embedding({.token_ids = token_ids, .from_slot = from_slot, .weight = &weights, .out = out});
    return out.Read();
  }
};
MEMSERVE_FOR_ALL_BACKENDS(WeightMatrixTest);

TEST_P(WeightMatrixTest, KeepsRowsStoredInPieces) {
  constexpr int64_t kN = 131, kK = 7;
  const std::vector<float> values = Reals(1, kN * kK);
  const auto weights = *backend().NewWeightMatrix({.n = kN, .k = kK});
  for (int64_t first : {128, 0, 64}) {
    const int64_t count = std::min<int64_t>(WeightMatrix::kStoreRows, kN - first);
    weights->Store(0, first, count, values.data() + first * kK, DType::kF32, kK);
  }
  for (int64_t row = 0; row < kN; ++row) {
    EXPECT_TRUE(SameBits(Row(*weights, row), {values.begin() + row * kK, values.begin() + (row + 1) * kK}, {kK}));
  }
}

TEST_P(WeightMatrixTest, TakesColumnsOutOfWiderRows) {
  const std::vector<float> wide = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  const auto weights = *backend().NewWeightMatrix({.n = 2, .k = 3});
  weights->Store(0, 0, 2, wide.data() + 1, DType::kF32, 5);
  EXPECT_EQ(Row(*weights, 0), (std::vector<float>{2, 3, 4}));
  EXPECT_EQ(Row(*weights, 1), (std::vector<float>{7, 8, 9}));
}

TEST_P(WeightMatrixTest, RoundsFloatsToNearestEvenWhenHeldInBfloat16) {
  const std::vector<float> values = {1.0f + 0x1p-8f, 1.0f + 0x1p-7f + 0x1p-8f, -3.14159265f};
  const auto weights = *backend().NewWeightMatrix({.n = 1, .k = 3, .dtype = DType::kBF16});
  weights->Store(0, 0, 1, values.data(), DType::kF32, 3);
  EXPECT_EQ(Row(*weights, 0), RoundedTo(DType::kBF16, values));
}

TEST_P(WeightMatrixTest, KeepsBfloat16AsItIsInEitherType) {
  std::vector<BFloat16> values;
  for (int i = 0; i < 40; ++i) values.push_back(ToBFloat16(0.1f * i - 2));
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    const auto weights = *backend().NewWeightMatrix({.n = 2, .k = 20, .dtype = dtype});
    weights->Store(0, 0, 2, values.data(), DType::kBF16, 20);
    for (int64_t i = 0; i < 20; ++i) EXPECT_EQ(Row(*weights, 1)[i], ToFloat(values[20 + i]));
  }
}

TEST_P(WeightMatrixTest, HoldsWhatWasPlanned) {
  for (const WeightMatrixSpec& spec :
       {WeightMatrixSpec{.groups = 1, .n = 1, .k = 1}, WeightMatrixSpec{.groups = 1, .n = 16, .k = 5},
        WeightMatrixSpec{.groups = 8, .n = 100, .k = 20, .dtype = DType::kBF16},
        WeightMatrixSpec{.groups = 1, .n = 1001, .k = 64, .dtype = DType::kBF16}}) {
    const auto weights = *backend().NewWeightMatrix(spec);
    EXPECT_LE(weights->bytes(), PlannedBytes(spec));
    EXPECT_GE(weights->bytes(), spec.groups * spec.n * spec.k * SizeOf(spec.dtype));
    if (is_reference()) continue;
    EXPECT_EQ(weights->bytes(), PlannedBytes(spec));
  }
}

TEST(PlannedBytesTest, PadsOutputsToSixteenAndBfloat16InputsToPairs) {
  EXPECT_EQ(PlannedBytes({.groups = 1, .n = 16, .k = 3}), 16 * 3 * 4);
  EXPECT_EQ(PlannedBytes({.groups = 4, .n = 17, .k = 3, .dtype = DType::kBF16}), 4 * 32 * 4 * 2);
  EXPECT_EQ(PlannedBytes({.groups = 1, .n = 0, .k = 3}), 0);
}

}  // namespace
}  // namespace memserve::kernels
