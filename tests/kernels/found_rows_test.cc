#include "kernels/found_rows.h"

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

using testing::ElementsAre;

struct Bags {
  std::vector<int32_t> rows;
  std::vector<float> weights;
};

class FoundRowsTest : public ContractTest {
 protected:
  Bags Masked(Bags bags, int64_t num_tokens, const std::vector<int32_t>& sequence, const std::vector<int32_t>& masked_end,
              const std::vector<int32_t>& masked) {
    const int64_t bag = num_tokens == 0 ? 3 : static_cast<int64_t>(bags.rows.size()) / num_tokens;
    const DeviceTensor<int32_t, 2> rows(backend(), {num_tokens, bag}, bags.rows);
    const DeviceTensor<float, 2> weights(backend(), {num_tokens, bag}, bags.weights);
    backend().MaskRows({.sequence = DeviceTensor<int32_t, 1>(backend(), {num_tokens}, sequence),
                        .masked_end = DeviceTensor<int32_t, 1>(backend(), {static_cast<int64_t>(masked_end.size())}, masked_end),
                        .masked = DeviceTensor<int32_t, 1>(backend(), {static_cast<int64_t>(masked.size())}, masked),
                        .rows = rows,
                        .weights = weights});
    return {rows.Read(), weights.Read()};
  }

  std::vector<uint32_t> Counted(const std::vector<int32_t>& rows, std::vector<uint32_t> counts, int64_t num_tokens = 1) {
    const int64_t bag = num_tokens == 0 ? 0 : static_cast<int64_t>(rows.size()) / num_tokens;
    const DeviceTensor<uint32_t, 1> counters(backend(), {static_cast<int64_t>(counts.size())}, counts);
    backend().CountRows({.rows = DeviceTensor<int32_t, 2>(backend(), {num_tokens, bag}, rows), .counts = counters});
    return counters.Read();
  }
};
MEMSERVE_FOR_ALL_BACKENDS(FoundRowsTest);

TEST_P(FoundRowsTest, MaskedRowsOfATokensOwnSequenceAreLeftOut) {
  // Token 0 is of sequence 1, which masks 3 and 7; token 1 of sequence 0, which masks nothing; token 2 of sequence 2, which masks
  // 0.
  const Bags found = Masked({{7, -1, 5, 7, 0, 3, 0, 7, 0}, {0.5f, 0, 0.25f, 1, 2, 3, 4, 5, 6}}, 3, {1, 0, 2}, {0, 2, 3}, {3, 7, 0});
  EXPECT_THAT(found.rows, ElementsAre(-1, -1, 5, 7, 0, 3, -1, 7, -1));
  EXPECT_THAT(found.weights, ElementsAre(0, 0, 0.25f, 1, 2, 3, 0, 5, 0));
}

TEST_P(FoundRowsTest, MasksManyRowsOfManyTokens) {
  constexpr int64_t kTokens = 67, kBag = 128, kSequences = 5;
  const Bags bags{Indices(1, kTokens * kBag, -1, 2999), Reals(2, kTokens * kBag, 0, 1)};
  const std::vector<int32_t> sequence = Indices(3, kTokens, 0, kSequences - 1);
  std::vector<int32_t> masked_end, masked;
  for (int s = 0; s < kSequences; ++s) {
    for (int32_t row = s; row < 3000 && s != 2; row += 2 + s) masked.push_back(row);
    masked_end.push_back(static_cast<int32_t>(masked.size()));
  }
  const Bags found = Masked(bags, kTokens, sequence, masked_end, masked);
  for (int64_t i = 0; i < kTokens * kBag; ++i) {
    const int32_t s = sequence[i / kBag], row = bags.rows[i];
    const bool out = row < 0 || (s != 2 && row >= s && (row - s) % (2 + s) == 0);
    ASSERT_EQ(found.rows[i], out ? -1 : row) << i;
    ASSERT_EQ(found.weights[i], out && row >= 0 ? 0 : bags.weights[i]) << i;
  }
  EXPECT_TRUE(Masked({}, 0, {}, {0}, {}).rows.empty());
}

TEST_P(FoundRowsTest, SelectsTheBagsOfTokensInTheOrderAskedFor) {
  const DeviceTensor<int32_t, 2> rows(backend(), {3, 2}, {1, 2, 3, -1, 5, 6}), out_rows(backend(), {2, 2});
  const DeviceTensor<float, 2> weights(backend(), {3, 2}, {0.1f, 0.2f, 0.3f, 0, 0.5f, 0.6f}), out_weights(backend(), {2, 2});
  backend().SelectBags({.tokens = DeviceTensor<int32_t, 1>(backend(), {2}, {2, 1}),
                        .rows = rows,
                        .weights = weights,
                        .out_rows = out_rows,
                        .out_weights = out_weights});
  EXPECT_THAT(out_rows.Read(), ElementsAre(5, 6, 3, -1));
  EXPECT_THAT(out_weights.Read(), ElementsAre(0.5f, 0.6f, 0.3f, 0));
}

TEST_P(FoundRowsTest, CountsEachReadAndNothingElse) {
  EXPECT_THAT(Counted({3, -1, 0, 3, 3, -1}, {10, 20, 30, 40}, 2), ElementsAre(11, 20, 30, 43));
  EXPECT_THAT(Counted({}, {1, 2}, 0), ElementsAre(1, 2));
}

TEST_P(FoundRowsTest, ACountStaysAtItsLimit) {
  const uint32_t most = std::numeric_limits<uint32_t>::max();
  EXPECT_THAT(Counted({0, 0, 1, 1}, {most - 1, most - 2}), ElementsAre(most, most));
  EXPECT_THAT(Counted({0, 1}, {most, 0}), ElementsAre(most, 1));
}

TEST_P(FoundRowsTest, CountsAsManyReadsAsManyThreadsFind) {
  constexpr int64_t kTokens = 301, kBag = 128, kRows = 1009;
  const std::vector<int32_t> rows = Indices(5, kTokens * kBag, -1, kRows - 1);
  std::vector<uint32_t> expected(kRows, 7);
  for (int32_t row : rows) {
    if (row >= 0) ++expected[row];
  }
  EXPECT_EQ(Counted(rows, std::vector<uint32_t>(kRows, 7), kTokens), expected);
}

}  // namespace
}  // namespace memserve::kernels
