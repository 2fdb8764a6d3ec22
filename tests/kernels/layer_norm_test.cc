#include "kernels/layer_norm.h"

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

std::vector<float> Normalise(Backend& backend, int64_t num_tokens, int64_t dim, const std::vector<float>& x,
                             const std::vector<float>& weight, const std::vector<float>& bias, float eps = 1e-5f) {
  const DeviceTensor<float, 2> device_x(backend, {num_tokens, dim}, x), out(backend, {num_tokens, dim});
  const DeviceTensor<float, 1> device_weight(backend, {dim}, weight), device_bias(backend, {dim}, bias);
  backend.LayerNorm({.x = device_x, .weight = device_weight, .bias = device_bias, .eps = eps, .out = out});
  EXPECT_EQ(device_x.Read(), x);
  return out.Read();
}

class LayerNormTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(LayerNormTest);

TEST_P(LayerNormTest, TakesTheMeanOffAndDividesByTheDeviation) {
  EXPECT_TRUE(NearRelative(Normalise(backend(), 2, 4, {1, 3, 1, 3, 9, 5, 5, 9}, {1, 2, 3, 4}, {0, 0, 10, 0}, 0),
                           {-1, 2, 7, 4, 1, -2, 7, 4}, 4, {2, 4}));
  EXPECT_TRUE(NearRelative(Normalise(backend(), 1, 2, {2, 4}, {2, 2}, {0, 0}, 3), {-1, 1}, 4, {1, 2}));
}

TEST_P(LayerNormTest, WorksInPlaceAndWithoutBias) {
  const DeviceTensor<float, 2> x(backend(), {1, 2}, {2, 4});
  const DeviceTensor<float, 1> weight(backend(), {2}, {5, 7});
  backend().LayerNorm({.x = x, .weight = weight, .eps = 0, .out = x});
  EXPECT_TRUE(NearRelative(x.Read(), {-5, 7}, 4, x.shape()));
}

TEST_P(LayerNormTest, AgreesWithTheReference) {
  const auto reference = NewReferenceBackend();
  for (int64_t num_tokens : {0, 1, 2, 7, 33}) {
    for (int64_t dim : {1, 3, 8, 15, 16, 17, 20, 64, 100, 1000}) {
      const std::vector<float> x = Reals(1, num_tokens * dim, -2, 4), weight = Reals(2, dim, 0.5, 2), bias = Reals(3, dim);
      const std::vector<float> expected = Normalise(*reference, num_tokens, dim, x, weight, bias);
      // Every sum has dim terms of at most 6; what the mean is off by is divided by the deviation, about 1.7 (one value: by
      // sqrt(eps)).
      const double tolerance = dim == 1 ? 1e-6 : 2 * kEpsilon * (dim + 16) * 6;
      EXPECT_TRUE(Near(Normalise(backend(), num_tokens, dim, x, weight, bias), expected, tolerance, {num_tokens, dim}))
          << num_tokens << " × " << dim;
    }
  }
}

TEST_P(LayerNormTest, GivesATokenTheSameBitsInEveryBatch) {
  constexpr int64_t kTokens = 37, kDim = 500;
  const std::vector<float> x = Reals(1, kTokens * kDim), weight = Reals(2, kDim), bias = Reals(3, kDim);
  const std::vector<float> all = Normalise(backend(), kTokens, kDim, x, weight, bias);
  const auto one_thread = GetParam().name == "cpu" ? Make({"cpu", 1, GetParam().isa}) : Make(GetParam());
  for (int64_t t = 0; t < kTokens; ++t) {
    const auto row = [t](const std::vector<float>& v) {
      return std::vector<float>(v.begin() + t * kDim, v.begin() + (t + 1) * kDim);
    };
    EXPECT_TRUE(SameBits(Normalise(backend(), 1, kDim, row(x), weight, bias), row(all), {kDim}));
    EXPECT_TRUE(SameBits(Normalise(*one_thread, 1, kDim, row(x), weight, bias), row(all), {kDim}));
  }
}

}  // namespace
}  // namespace memserve::kernels
