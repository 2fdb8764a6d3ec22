#include "kernels/row_dot.h"

#include <cmath>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> Dots(Backend& backend, RowStore& table, int64_t num_tokens, int64_t bag, const std::vector<int32_t>& rows,
                        const std::vector<float>& x) {
  const DeviceTensor<int32_t, 2> device_rows(backend, {num_tokens, bag}, rows);
  const DeviceTensor<float, 2> device_x(backend, {num_tokens, table.spec().dim}, x), out(backend, {num_tokens, bag});
  backend.RowDot({.table = &table, .rows = device_rows, .x = device_x, .out = out});
  return out.Read();
}

class RowDotTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(RowDotTest);

TEST_P(RowDotTest, MultipliesEachRowWithItsToken) {
  const auto table = NewTable(backend(), {.rows = 3, .dim = 2, .end_column = 2}, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(Dots(backend(), *table, 2, 2, {0, 2, 1, 1}, {1, 10, 2, -1}), (std::vector<float>{21, 65, 2, 2}));
}

TEST_P(RowDotTest, GivesZeroForRowsOfMinusOne) {
  const auto table = NewTable(backend(), {.rows = 1, .dim = 3, .end_column = 3}, {1, 2, 3});
  EXPECT_EQ(Dots(backend(), *table, 2, 2, {-1, 0, -1, -1}, {1, 1, 1, kNan, kNan, kNan}), (std::vector<float>{0, 6, 0, 0}));
}

TEST_P(RowDotTest, TakesTheColumnsOfItsStoreOutOfTheWholeVector) {
  const auto table = NewTable(backend(), {.rows = 1, .dim = 8, .first_column = 4, .end_column = 8}, {1, 2, 3, 4, 5, 6, 7, 8});
  EXPECT_EQ(Dots(backend(), *table, 1, 1, {0}, {kNan, kNan, kNan, kNan, 1000, 100, 10, 1}), std::vector<float>{5678});
}

TEST_P(RowDotTest, IsExactOnIntegersAndNearOnReals) {
  constexpr int64_t kRows = 30;
  for (DType format : kRowFormats) {
    for (int64_t dim : {1, 3, 8, 15, 20, 64, 100, 1000}) {
      for (bool integers : {true, false}) {
        if (integers && HasScales(format)) continue;
        const std::vector<float> values = integers ? Integers(1, kRows * dim) : Reals(1, kRows * dim);
        const StoredRows stored = StoredAs(format, values, dim);
        const auto table = NewTable(backend(), {.rows = kRows, .dim = dim, .end_column = dim, .format = format}, values);
        for (int64_t num_tokens : {0, 1, 3, 17}) {
          for (int64_t bag : {0, 1, 5, 32}) {
            const std::vector<float> x = integers ? Integers(2, num_tokens * dim) : Reals(2, num_tokens * dim);
            const std::vector<int32_t> rows = Indices(3, num_tokens * bag, -1, kRows - 1);
            std::vector<float> expected;
            std::vector<double> tolerance;
            for (int64_t i = 0; i < num_tokens * bag; ++i) {
              double sum = 0, absolute = 0;
              for (int64_t c = 0; rows[i] >= 0 && c < dim; ++c) {
                const double term = double{stored.scales[rows[i]]} * stored.codes[rows[i] * dim + c] * x[i / bag * dim + c];
                sum += term;
                absolute += std::abs(term);
              }
              expected.push_back(sum);
              tolerance.push_back(integers ? 0 : (dim + 1) * kEpsilon * absolute);
            }
            EXPECT_TRUE(Near(Dots(backend(), *table, num_tokens, bag, rows, x), expected, tolerance, {num_tokens, bag}))
                << NameOf(format) << ", dim " << dim << (integers ? ", integers" : ", reals");
          }
        }
      }
    }
  }
}

TEST_P(RowDotTest, GivesAnEntryTheSameBitsInEveryBatchAndPlace) {
  constexpr int64_t kDim = 333, kTokens = 9, kBag = 7;
  const std::vector<float> values = Reals(1, 20 * kDim), x = Reals(2, kTokens * kDim);
  const auto table = NewTable(backend(), {.rows = 20, .dim = kDim, .end_column = kDim}, values);
  const std::vector<int32_t> rows = Indices(3, kTokens * kBag, 0, 19);
  const std::vector<float> all = Dots(backend(), *table, kTokens, kBag, rows, x);
  const auto other = is_reference() ? NewReferenceBackend() : Make({"cpu", GetParam().threads == 1 ? 3 : 1, GetParam().isa});
  const auto other_table = NewTable(*other, table->spec(), values);
  for (int64_t i = 0; i < kTokens * kBag; ++i) {
    const std::vector<float> token(x.begin() + i / kBag * kDim, x.begin() + (i / kBag + 1) * kDim);
    EXPECT_EQ(Dots(backend(), *table, 1, 1, {rows[i]}, token)[0], all[i]) << "entry " << i;
    EXPECT_EQ(Dots(*other, *other_table, 1, 1, {rows[i]}, token)[0], all[i]) << "entry " << i;
  }
}

class GeluScaleTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(GeluScaleTest);

TEST_P(GeluScaleTest, MultipliesWeightsByTheExactGelu) {
  for (auto [num_tokens, bag] : {std::pair<int64_t, int64_t>{0, 4}, {1, 1}, {3, 7}, {2, 128}}) {
    std::vector<float> dots = Reals(1, num_tokens * bag, -6, 6), weights = Reals(2, num_tokens * bag), expected;
    std::vector<double> tolerance;
    for (size_t i = 0; i < dots.size(); ++i) {
      // erfc keeps its digits where 1 + erf cancels.
      expected.push_back(0.5 * dots[i] * std::erfc(-dots[i] / std::sqrt(2.0)) * weights[i]);
      tolerance.push_back(16 * kEpsilon * std::abs(dots[i] * weights[i]));
    }
    const DeviceTensor<float, 2> device_weights(backend(), {num_tokens, bag}, weights);
    backend().GeluScale({.dots = DeviceTensor<float, 2>(backend(), {num_tokens, bag}, dots), .weights = device_weights});
    EXPECT_TRUE(Near(device_weights.Read(), expected, tolerance, device_weights.shape())) << num_tokens << " × " << bag;
  }
}

TEST_P(GeluScaleTest, KnowsTheEnds) {
  const DeviceTensor<float, 2> dots(backend(), {1, 4}, {0, 1, 100, -100}), weights(backend(), {1, 4}, {3, 1, 2, 2});
  backend().GeluScale({.dots = dots, .weights = weights});
  EXPECT_TRUE(Near(weights.Read(), {0, 0.8413447460685429f, 200, 0}, 1e-6, {4}));
}

}  // namespace
}  // namespace memserve::kernels
