#include "kernels/embedding.h"

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

class EmbeddingTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(EmbeddingTest);

TEST_P(EmbeddingTest, TakesTheRowOfEachToken) {
  const auto weight = NewWeights(backend(), {.n = 3, .k = 2}, {10, 11, 20, 21, 30, 31});
  const DeviceTensor<int32_t, 1> token_ids(backend(), {3}, {2, 0, 2}), from_slot(backend(), {3}, {-1, -1, -1});
  const DeviceTensor<float, 2> out(backend(), {3, 2});
  backend().Embedding({.token_ids = token_ids, .from_slot = from_slot, .weight = weight.get(), .out = out});
  EXPECT_EQ(out.Read(), (std::vector<float>{30, 31, 10, 11, 30, 31}));
}

TEST_P(EmbeddingTest, TakesTheSampledTokenOfASlotWhereAsked) {
  const auto weight = NewWeights(backend(), {.n = 4, .k = 1}, {10, 20, 30, 40});
  const DeviceTensor<int32_t, 1> token_ids(backend(), {3}, {-7, 1, 999});  // not looked at where a slot is given
  const DeviceTensor<int32_t, 1> from_slot(backend(), {3}, {1, -1, 0}), sampled(backend(), {2}, {2, 3});
  const DeviceTensor<float, 2> out(backend(), {3, 1});
  backend().Embedding({.token_ids = token_ids, .from_slot = from_slot, .sampled = sampled, .weight = weight.get(), .out = out});
  EXPECT_EQ(out.Read(), (std::vector<float>{40, 20, 30}));
}

TEST_P(EmbeddingTest, GivesEveryRowOfEveryShapeBitForBit) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int64_t vocab_size : {1, 2, 17, 101}) {
      for (int64_t dim : {1, 3, 8, 20, 33, 64}) {
        for (int64_t num_tokens : {0, 1, 2, 7, 33}) {
          const std::vector<float> values = RoundedTo(dtype, Reals(vocab_size, vocab_size * dim));
          const auto weight = NewWeights(backend(), {.n = vocab_size, .k = dim, .dtype = dtype}, values);
          std::vector<int32_t> ids = Indices(dim, num_tokens, 0, vocab_size - 1);
          if (num_tokens > 0) ids[num_tokens - 1] = vocab_size - 1;
          const DeviceTensor<int32_t, 1> token_ids(backend(), {num_tokens}, ids);
          const DeviceTensor<int32_t, 1> from_slot(backend(), {num_tokens}, std::vector<int32_t>(num_tokens, -1));
          const DeviceTensor<float, 2> out(backend(), {num_tokens, dim});
          backend().Embedding({.token_ids = token_ids, .from_slot = from_slot, .weight = weight.get(), .out = out});
          std::vector<float> expected;
          for (int32_t id : ids) expected.insert(expected.end(), values.begin() + id * dim, values.begin() + (id + 1) * dim);
          EXPECT_TRUE(SameBits(out.Read(), expected, out.shape())) << NameOf(dtype) << " " << vocab_size << " × " << dim;
        }
      }
    }
  }
}

}  // namespace
}  // namespace memserve::kernels
