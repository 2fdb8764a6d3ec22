#include "kernels/row_store.h"

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

class RowStoreTest : public ContractTest {
 protected:
  std::vector<float> Row(RowStore& table, int32_t row) {
    const DeviceTensor<int32_t, 2> rows(backend(), {1, 1}, {row});
    const DeviceTensor<float, 2> weights(backend(), {1, 1}, {1}), out(backend(), {1, table.spec().columns()});
    backend().EmbeddingBag({.table = &table, .rows = rows, .weights = weights, .out = out});
    return out.Read();
  }
};
MEMSERVE_FOR_ALL_BACKENDS(RowStoreTest);

TEST_P(RowStoreTest, KeepsRowsStoredInPiecesFromEitherType) {
  for (DType format : {DType::kF32, DType::kBF16}) {
    const std::vector<float> values = RoundedTo(DType::kBF16, Reals(1, 7 * 5));
    std::vector<BFloat16> narrow;
    for (float value : values) narrow.push_back(ToBFloat16(value));
    const auto table = *backend().NewRowStore({.rows = 7, .dim = 5, .end_column = 5, .format = format});
    table->Store(4, 3, values.data() + 4 * 5, DType::kF32);
    table->Store(0, 1, values.data(), DType::kF32);
    table->Store(1, 3, narrow.data() + 5, DType::kBF16);
    table->Store(7, 0, nullptr, DType::kF32);
    for (int32_t row = 0; row < 7; ++row) {
      EXPECT_TRUE(SameBits(Row(*table, row), {values.begin() + row * 5, values.begin() + (row + 1) * 5}, {5})) << "row " << row;
    }
  }
}

TEST_P(RowStoreTest, RoundsFloatsToNearestEvenInBfloat16) {
  const std::vector<float> values = Reals(1, 3 * 40);
  const auto table = NewTable(backend(), {.rows = 3, .dim = 40, .end_column = 40, .format = DType::kBF16}, values);
  const std::vector<float> rounded = RoundedTo(DType::kBF16, values);
  for (int32_t row = 0; row < 3; ++row) {
    EXPECT_TRUE(SameBits(Row(*table, row), {rounded.begin() + row * 40, rounded.begin() + (row + 1) * 40}, {40}));
  }
}

TEST_P(RowStoreTest, KeepsItsColumnsOfWholeRows) {
  const std::vector<float> values = Reals(1, 3 * 20);
  const auto table = NewTable(backend(), {.rows = 3, .dim = 20, .first_column = 8, .end_column = 20}, values);
  for (int32_t row = 0; row < 3; ++row) {
    EXPECT_TRUE(SameBits(Row(*table, row), {values.begin() + row * 20 + 8, values.begin() + (row + 1) * 20}, {12}));
  }
}

TEST_P(RowStoreTest, LetsTheLoaderWriteWholeRowsWhereItSaysSo) {
  const std::vector<float> values = Reals(1, 4 * 16);
  const auto table = *backend().NewRowStore({.rows = 4, .dim = 16, .end_column = 16});
  if (table->DirectRows() == nullptr) GTEST_SKIP() << "not this back end";
  std::memcpy(table->DirectRows(), values.data(), values.size() * sizeof(float));
  EXPECT_TRUE(SameBits(Row(*table, 3), {values.begin() + 48, values.end()}, {16}));
  const auto part = *backend().NewRowStore({.rows = 4, .dim = 16, .first_column = 4, .end_column = 16});
  EXPECT_EQ(part->DirectRows(), nullptr);
}

TEST_P(RowStoreTest, QuantisesEachRowByItsLargestMagnitudeRoundingToNearestEven) {
  //                             int8: scale 2, ties to even         int4 of the same: scale 254/7, columns odd in number
  const std::vector<float> values = {254, -254, 3, 5, -3, 1, 0,      0, 0, 0, 0, 0, 0, 0,      7, -7, 0.5, 1.5, 2.5, -1.5, 6.4f};
  const auto int8 = NewTable(backend(), {.rows = 3, .dim = 7, .end_column = 7, .format = DType::kI8}, values);
  EXPECT_EQ(Row(*int8, 0), (std::vector<float>{254, -254, 4, 4, -4, 0, 0}));
  EXPECT_EQ(Row(*int8, 1), std::vector<float>(7, 0.0f));
  const auto int4 = NewTable(backend(), {.rows = 3, .dim = 7, .end_column = 7, .format = DType::kI4}, values);
  EXPECT_EQ(Row(*int4, 1), std::vector<float>(7, 0.0f));
  EXPECT_EQ(Row(*int4, 2), (std::vector<float>{7, -7, 0, 2, 2, -2, 6}));
}

TEST_P(RowStoreTest, TakesQuantisedRowsWithTheirScalesAndGivesTheirValuesInEveryFormat) {
  constexpr int64_t kRows = 5, kDim = 67;
  for (DType source : {DType::kI8, DType::kI4}) {
    const StoredRows stored = StoredAs(source, Reals(1, kRows * kDim), kDim);
    std::vector<uint8_t> bytes;
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t c = 0; c < kDim; ++c) {
        const int code = static_cast<int>(stored.codes[row * kDim + c]);
        if (source == DType::kI8) bytes.push_back(static_cast<uint8_t>(code));
        else if (c % 2 == 0) bytes.push_back(static_cast<uint8_t>(code + 8));
        else bytes.back() |= static_cast<uint8_t>((code + 8) << 4);
      }
    }
    const int64_t row_bytes = RowBytes(source, kDim);
    std::vector<float> values;
    for (int64_t i = 0; i < kRows * kDim; ++i) values.push_back(stored.scales[i / kDim] * stored.codes[i]);
    for (DType format : kRowFormats) {
      const auto table = *backend().NewRowStore({.rows = kRows, .dim = kDim, .end_column = kDim, .format = format});
      table->Store(2, 3, bytes.data() + 2 * row_bytes, source, stored.scales.data() + 2);
      table->Store(0, 2, bytes.data(), source, stored.scales.data());
      const StoredRows expected = format == source ? stored : StoredAs(format, values, kDim);
      for (int32_t row = 0; row < kRows; ++row) {
        std::vector<float> of_row;
        for (int64_t c = 0; c < kDim; ++c) of_row.push_back(expected.scales[row] * expected.codes[row * kDim + c]);
        EXPECT_TRUE(SameBits(Row(*table, row), of_row, {kDim})) << NameOf(source) << " to " << NameOf(format) << ", row " << row;
      }
    }
  }
}

TEST_P(RowStoreTest, QuantisesByTheWholeRowWhereItKeepsAPartOfTheColumns) {
  std::vector<float> values = Reals(1, 3 * 96);
  values[0] = 100;  // the largest of row 0 lies outside the part
  for (DType format : {DType::kI8, DType::kI4}) {
    const auto whole = NewTable(backend(), {.rows = 3, .dim = 96, .end_column = 96, .format = format}, values);
    const auto part = NewTable(backend(), {.rows = 3, .dim = 96, .first_column = 32, .end_column = 64, .format = format}, values);
    for (int32_t row = 0; row < 3; ++row) {
      const std::vector<float> all = Row(*whole, row);
      EXPECT_TRUE(SameBits(Row(*part, row), {all.begin() + 32, all.begin() + 64}, {32})) << NameOf(format);
    }
  }
}

TEST_P(RowStoreTest, LetsTheLoaderWriteCodesAndScalesWhereItSaysSo) {
  const auto table = *backend().NewRowStore({.rows = 2, .dim = 16, .end_column = 16, .format = DType::kI8});
  if (table->DirectRows() == nullptr) GTEST_SKIP() << "not this back end";
  std::memset(table->DirectRows(), 3, 32);
  table->DirectScales()[1] = 0.5f;
  EXPECT_EQ(Row(*table, 1), std::vector<float>(16, 1.5f));
  EXPECT_EQ((*backend().NewRowStore({.rows = 2, .dim = 16, .end_column = 16}))->DirectScales(), nullptr);
}

TEST_P(RowStoreTest, SaysWhatItHolds) {
  const auto quantised = *backend().NewRowStore({.rows = 1000, .dim = 33, .end_column = 33, .format = DType::kI4});
  EXPECT_EQ(quantised->bytes(), 1000 * (17 + 4));

  const auto table = *backend().NewRowStore({.rows = 100'000, .dim = 24, .first_column = 8, .end_column = 24, .format = DType::kBF16});
  EXPECT_GE(table->bytes(), 100'000 * 16 * 2);
  EXPECT_LE(table->bytes(), 100'000 * 64 + (4 << 20));  // rows padded to a cache line, memory to huge pages
  EXPECT_STREQ(table->placement(), "host");
  EXPECT_EQ(table->spec().columns(), 16);
}

// Untouched rows of the table are pages that never come to be, so this costs little.
TEST_P(RowStoreTest, ReachesRowsBeyondTwoToTheThirtyTwoBytesAndTwoToTheThirtyOneElements) {
  if (kSanitized) GTEST_SKIP() << "sanitizers touch what they allocate";
  constexpr int64_t kDim = 1024, kRows = (int64_t{1} << 21) + 3;  // 4.3 GB
  const auto created = backend().NewRowStore({.rows = kRows, .dim = kDim, .end_column = kDim, .format = DType::kBF16});
  if (!created.ok()) GTEST_SKIP() << created.status();
  const auto& table = *created;
  const std::vector<float> values = Integers(1, kDim, 1, 100);
  table->Store(kRows - 1, 1, values.data(), DType::kF32);
  EXPECT_TRUE(SameBits(Row(*table, kRows - 1), values, {kDim}));
  const std::vector<float> zeros(kDim, 0.0f);
  for (int64_t row : {int64_t{2}, int64_t{1} << 20, int64_t{1} << 21}) EXPECT_TRUE(SameBits(Row(*table, row), zeros, {kDim}));

  const DeviceTensor<int32_t, 2> rows(backend(), {1, 2}, {-1, static_cast<int32_t>(kRows - 1)});
  const DeviceTensor<float, 2> x(backend(), {1, kDim}, std::vector<float>(kDim, 1.0f)), dots(backend(), {1, 2});
  backend().RowDot({.table = table.get(), .rows = rows, .x = x, .out = dots});
  float sum = 0;
  for (float value : values) sum += value;
  EXPECT_EQ(dots.Read(), (std::vector<float>{0, sum}));
}

}  // namespace
}  // namespace memserve::kernels
