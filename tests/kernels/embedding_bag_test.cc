#include "kernels/embedding_bag.h"

#include <cmath>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Bags {
  int64_t num_bags;
  int64_t bag;
  std::vector<int32_t> rows;   // [num_bags, bag]
  std::vector<float> weights;  // [num_bags, bag]
  std::vector<int32_t> overlay_of_bag = {};
  std::vector<const RowOverlay*> overlays = {};
};

std::vector<float> SumBags(Backend& backend, RowStore& table, const Bags& bags) {
  const DeviceTensor<int32_t, 2> rows(backend, {bags.num_bags, bags.bag}, bags.rows);
  const DeviceTensor<float, 2> weights(backend, {bags.num_bags, bags.bag}, bags.weights);
  const DeviceTensor<float, 2> out(backend, {bags.num_bags, table.spec().columns()});
  EmbeddingBagArgs args{.table = &table, .rows = rows, .weights = weights, .out = out};
  std::vector<int32_t> overlay_of_bag = bags.overlay_of_bag;
  if (!overlay_of_bag.empty()) {
    args.overlay_of_bag = TensorView<int32_t, 1>(overlay_of_bag.data(), {bags.num_bags});
    args.overlays = bags.overlays.data();
  }
  backend.EmbeddingBag(args);
  return out.Read();
}

// One fma chain per output, over a table of `dim` columns.
std::vector<float> Expected(const StoredRows& table, int64_t dim, const Bags& bags) {
  std::vector<float> out(bags.num_bags * dim);
  for (int64_t b = 0; b < bags.num_bags; ++b) {
    for (int64_t i = 0; i < bags.bag; ++i) {
      const int64_t row = bags.rows[b * bags.bag + i];
      if (row < 0) continue;
      const float weight = bags.weights[b * bags.bag + i] * table.scales[row];
      for (int64_t c = 0; c < dim; ++c) out[b * dim + c] = std::fma(weight, table.codes[row * dim + c], out[b * dim + c]);
    }
  }
  return out;
}

RowStoreSpec Whole(int64_t rows, int64_t dim, DType format = DType::kF32) {
  return {.rows = rows, .dim = dim, .first_column = 0, .end_column = dim, .format = format};
}

class EmbeddingBagTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(EmbeddingBagTest);

TEST_P(EmbeddingBagTest, SumsWeightedRows) {
  const auto table = NewTable(backend(), Whole(3, 2), {1, 2, 10, 20, 100, 200});
  const Bags bags{.num_bags = 2, .bag = 2, .rows = {0, 2, 1, 1}, .weights = {1, 0.5, 2, -1}};
  EXPECT_EQ(SumBags(backend(), *table, bags), (std::vector<float>{51, 102, 10, 20}));
}

TEST_P(EmbeddingBagTest, LeavesOutRowsOfMinusOne) {
  const auto table = NewTable(backend(), Whole(2, 3), {kNan, kNan, kNan, 1, 2, 3});
  const Bags bags{
      .num_bags = 3, .bag = 3, .rows = {-1, 1, -1, 1, -1, 1, -1, -1, -1}, .weights = {kNan, 2, INFINITY, 1, 0, 1, kNan, 1, 1}};
  EXPECT_EQ(SumBags(backend(), *table, bags), (std::vector<float>{2, 4, 6, 2, 4, 6, 0, 0, 0}));
}

TEST_P(EmbeddingBagTest, GivesZerosForABagOfNoEntries) {
  const auto table = NewTable(backend(), Whole(2, 5), Reals(1, 10));
  EXPECT_EQ(SumBags(backend(), *table, {.num_bags = 3, .bag = 0}), std::vector<float>(15, 0.0f));
}

TEST_P(EmbeddingBagTest, AddsInTheOrderOfTheBag) {
  // 1 is lost beside 2^30 in float32, so the order shows.
  const auto table = NewTable(backend(), Whole(3, 1), {0x1p30f, 1, -0x1p30f});
  EXPECT_EQ(SumBags(backend(), *table, {.num_bags = 1, .bag = 3, .rows = {0, 1, 2}, .weights = {1, 1, 1}}), std::vector<float>{0});
  EXPECT_EQ(SumBags(backend(), *table, {.num_bags = 1, .bag = 3, .rows = {0, 2, 1}, .weights = {1, 1, 1}}), std::vector<float>{1});
}

TEST_P(EmbeddingBagTest, IsOneChainOfFusedMultiplyAddsAtEveryShape) {
  constexpr int64_t kRows = 50;
  for (DType format : kRowFormats) {
    for (int64_t dim : {1, 3, 8, 15, 16, 17, 20, 64, 100, 256, 1000, 2056}) {
      const std::vector<float> values = Reals(1, kRows * dim);
      const auto table = NewTable(backend(), Whole(kRows, dim, format), values);
      const StoredRows stored = StoredAs(format, values, dim);
      for (int64_t num_bags : {0, 1, 2, 3, 17}) {
        for (int64_t bag : {0, 1, 2, 7, 33, 128}) {
          if (dim * num_bags * bag > 300'000) continue;
          Bags bags{.num_bags = num_bags,
                    .bag = bag,
                    .rows = Indices(2, num_bags * bag, -1, kRows - 1),
                    .weights = Reals(3, num_bags * bag)};
          if (!bags.rows.empty()) bags.rows.back() = kRows - 1;
          EXPECT_TRUE(SameBits(SumBags(backend(), *table, bags), Expected(stored, dim, bags), {num_bags, dim}))
              << NameOf(format) << ", dim " << dim << ", bags " << num_bags << " of " << bag;
        }
      }
    }
  }
}

TEST_P(EmbeddingBagTest, GivesTheSameBitsForEverySplitOfTheColumns) {
  constexpr int64_t kRows = 20, kDim = 100, kBag = 9, kNumBags = 5;
  for (DType format : kRowFormats) {
    const std::vector<float> values = Reals(1, kRows * kDim);
    const Bags bags{.num_bags = kNumBags,
                    .bag = kBag,
                    .rows = Indices(2, kNumBags * kBag, -1, kRows - 1),
                    .weights = Reals(3, kNumBags * kBag)};
    const std::vector<float> whole = SumBags(backend(), *NewTable(backend(), Whole(kRows, kDim, format), values), bags);
    const int64_t unit = ColumnsOf16Bytes(format);
    for (int64_t split = unit; split < kDim; split += unit) {
      for (auto [first, end] : {std::pair<int64_t, int64_t>{0, split}, {split, kDim}, {split - unit, split}}) {
        const auto part =
            NewTable(backend(), {.rows = kRows, .dim = kDim, .first_column = first, .end_column = end, .format = format}, values);
        std::vector<float> expected;
        for (int64_t b = 0; b < kNumBags; ++b)
          expected.insert(expected.end(), whole.begin() + b * kDim + first, whole.begin() + b * kDim + end);
        EXPECT_TRUE(SameBits(SumBags(backend(), *part, bags), expected, {kNumBags, end - first}))
            << "columns " << first << " to " << end;
      }
    }
  }
}

TEST_P(EmbeddingBagTest, TakesRowsFromTheOverlayOfTheirBagInTheOrderOfTheBag) {
  constexpr int64_t kRows = 12, kDim = 20, kBag = 6;
  for (DType format : kRowFormats) {
    const std::vector<float> values = Reals(1, kRows * kDim);
    const auto table = NewTable(backend(), Whole(kRows, kDim, format), values);
    const RowOverlay first{{0, 5, 11}, Reals(2, 3 * kDim)}, second{{3}, Reals(3, kDim)}, empty;
    Bags bags{.num_bags = 5, .bag = kBag, .weights = Reals(4, 5 * kBag)};
    for (int b = 0; b < 5; ++b) bags.rows.insert(bags.rows.end(), {5, 3, -1, 11, 0, 7});
    bags.overlay_of_bag = {0, -1, 1, 2, 0};
    bags.overlays = {&first, &second, &empty};

    // Overlay values are float32, whatever the table's format.
    std::vector<float> expected;
    for (int b = 0; b < 5; ++b) {
      StoredRows replaced = StoredAs(format, values, kDim);
      if (bags.overlay_of_bag[b] >= 0) {
        const RowOverlay& overlay = *bags.overlays[bags.overlay_of_bag[b]];
        for (size_t i = 0; i < overlay.rows.size(); ++i) {
          std::copy_n(overlay.values.begin() + i * kDim, kDim, replaced.codes.begin() + overlay.rows[i] * kDim);
          replaced.scales[overlay.rows[i]] = 1;
        }
      }
      const Bags one{.num_bags = 1,
                     .bag = kBag,
                     .rows = {5, 3, -1, 11, 0, 7},
                     .weights = {bags.weights.begin() + b * kBag, bags.weights.begin() + (b + 1) * kBag}};
      const std::vector<float> sum = Expected(replaced, kDim, one);
      expected.insert(expected.end(), sum.begin(), sum.end());
    }
    EXPECT_TRUE(SameBits(SumBags(backend(), *table, bags), expected, {5, kDim})) << NameOf(format);
  }
}

TEST_P(EmbeddingBagTest, ReadsOverlaysOfTheColumnsOfItsStore) {
  const auto part = NewTable(backend(), {.rows = 2, .dim = 8, .first_column = 4, .end_column = 8}, Reals(1, 16));
  const RowOverlay overlay{{0, 1}, {9, 9, 9, 9, 1, 2, 3, 4}};
  const Bags bags{.num_bags = 1, .bag = 1, .rows = {1}, .weights = {2}, .overlay_of_bag = {0}, .overlays = {&overlay}};
  EXPECT_EQ(SumBags(backend(), *part, bags), (std::vector<float>{2, 4, 6, 8}));
}

TEST_P(EmbeddingBagTest, LetsSeveralTicketsRunAtOnceAndEndInAnyOrder) {
  const std::vector<float> values = Reals(1, 10 * 8);
  const auto table = NewTable(backend(), Whole(10, 8), values);
  const DeviceTensor<int32_t, 2> rows_a(backend(), {1, 2}, {1, 2}), rows_b(backend(), {2, 1}, {9, 0});
  const DeviceTensor<float, 2> weights_a(backend(), {1, 2}, {1, 1}), weights_b(backend(), {2, 1}, {1, 2});
  const DeviceTensor<float, 2> out_a(backend(), {1, 8}), out_b(backend(), {2, 8});
  const RowStore::Ticket a = table->Start({.table = table.get(), .rows = rows_a, .weights = weights_a, .out = out_a});
  const RowStore::Ticket b = table->Start({.table = table.get(), .rows = rows_b, .weights = weights_b, .out = out_b});
  EXPECT_TRUE(table->Finish(b).ok());
  EXPECT_TRUE(table->Finish(a).ok());
  const Bags bags_a{.num_bags = 1, .bag = 2, .rows = {1, 2}, .weights = {1, 1}};
  const Bags bags_b{.num_bags = 2, .bag = 1, .rows = {9, 0}, .weights = {1, 2}};
  EXPECT_TRUE(SameBits(out_a.Read(), Expected(StoredAs(DType::kF32, values, 8), 8, bags_a), {1, 8}));
  EXPECT_TRUE(SameBits(out_b.Read(), Expected(StoredAs(DType::kF32, values, 8), 8, bags_b), {2, 8}));
}

}  // namespace
}  // namespace memserve::kernels
