#include "kernels/rms_norm.h"

#include <optional>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

struct Result {
  std::vector<float> x;
  std::vector<float> out;
};

Result Normalise(Backend& backend, int64_t num_tokens, int64_t dim, const std::vector<float>& x, const std::vector<float>& delta,
                 const std::vector<float>& weight, float eps = 1e-5f) {
  const DeviceTensor<float, 2> device_x(backend, {num_tokens, dim}, x), device_delta(backend, {num_tokens, dim}, delta);
  const DeviceTensor<float, 1> device_weight(backend, {dim}, weight);
  const DeviceTensor<float, 2> out(backend, {num_tokens, dim});
  backend.RmsNorm({.x = device_x, .delta = device_delta, .weight = device_weight, .eps = eps, .out = out});
  return {device_x.Read(), out.Read()};
}

class RmsNormTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(RmsNormTest);

TEST_P(RmsNormTest, DividesByTheRootMeanSquare) {
  const DeviceTensor<float, 2> x(backend(), {2, 4}, {1, -1, 1, -1, 2, 2, -2, 2});
  const DeviceTensor<float, 1> weight(backend(), {4}, {1, 2, 3, 4});
  const DeviceTensor<float, 2> out(backend(), {2, 4});
  backend().RmsNorm({.x = x, .weight = weight, .eps = 0, .out = out});
  EXPECT_TRUE(NearRelative(out.Read(), {1, -2, 3, -4, 1, 2, -3, 4}, 4, out.shape()));
  EXPECT_EQ(x.Read(), (std::vector<float>{1, -1, 1, -1, 2, 2, -2, 2}));
}

TEST_P(RmsNormTest, AddsTheDeltaFirstAndKeepsIt) {
  const Result result = Normalise(backend(), 1, 2, {1, 5}, {2, -2}, {1, 1}, 0);
  EXPECT_EQ(result.x, (std::vector<float>{3, 3}));
  EXPECT_TRUE(NearRelative(result.out, {1, 1}, 4, {1, 2}));
}

TEST_P(RmsNormTest, AddsEpsilonToTheMean) {
  const Result result = Normalise(backend(), 1, 2, {0, 0}, {0, 0}, {1, 1}, 1);
  EXPECT_EQ(result.out, (std::vector<float>{0, 0}));
  EXPECT_TRUE(NearRelative(Normalise(backend(), 1, 2, {1, 1}, {0, 0}, {2, 2}, 3).out, {1, 1}, 4, {1, 2}));
}

TEST_P(RmsNormTest, LeavesTokensAloneWhoseDeltaIsOff) {
  const DeviceTensor<float, 2> x(backend(), {3, 1}, {1, 2, 3}), delta(backend(), {3, 1}, {10, NAN, 30});
  const DeviceTensor<int32_t, 1> delta_on(backend(), {3}, {1, 0, -5});
  const DeviceTensor<float, 1> weight(backend(), {1}, {2});
  const DeviceTensor<float, 2> out(backend(), {3, 1});
  backend().RmsNorm({.x = x, .delta = delta, .delta_on = delta_on, .weight = weight, .eps = 0, .out = out});
  EXPECT_EQ(x.Read(), (std::vector<float>{11, 2, 33}));
  EXPECT_TRUE(NearRelative(out.Read(), {2, 2, 2}, 4, {3, 1}));
}

TEST_P(RmsNormTest, WithoutOutOnlyAdds) {
  const DeviceTensor<float, 2> x(backend(), {1, 3}, {1, 2, 3}), delta(backend(), {1, 3}, {4, 5, 6});
  backend().RmsNorm({.x = x, .delta = delta});
  EXPECT_EQ(x.Read(), (std::vector<float>{5, 7, 9}));
}

TEST_P(RmsNormTest, AgreesWithTheReference) {
  const auto reference = NewReferenceBackend();
  for (int64_t num_tokens : {0, 1, 2, 3, 7, 33}) {
    for (int64_t dim : {1, 3, 8, 15, 16, 17, 20, 64, 100, 1000}) {
      const std::vector<float> x = Reals(1, num_tokens * dim, -3, 3), delta = Reals(2, num_tokens * dim);
      const std::vector<float> weight = Reals(3, dim, 0.5, 2);
      const Result actual = Normalise(backend(), num_tokens, dim, x, delta, weight);
      const Result expected = Normalise(*reference, num_tokens, dim, x, delta, weight);
      EXPECT_TRUE(SameBits(actual.x, expected.x, {num_tokens, dim}));
      EXPECT_TRUE(NearRelative(actual.out, expected.out, dim + 4, {num_tokens, dim})) << num_tokens << " × " << dim;
    }
  }
}

TEST_P(RmsNormTest, GivesATokenTheSameBitsInEveryBatch) {
  constexpr int64_t kTokens = 37, kDim = 500;
  const std::vector<float> x = Reals(1, kTokens * kDim), delta = Reals(2, kTokens * kDim), weight = Reals(3, kDim);
  const Result all = Normalise(backend(), kTokens, kDim, x, delta, weight);
  const auto one_thread = GetParam().name == "cpu" ? Make({"cpu", 1, GetParam().isa}) : Make(GetParam());
  for (int64_t t = 0; t < kTokens; ++t) {
    const auto row = [t](const std::vector<float>& v) {
      return std::vector<float>(v.begin() + t * kDim, v.begin() + (t + 1) * kDim);
    };
    EXPECT_TRUE(SameBits(Normalise(backend(), 1, kDim, row(x), row(delta), weight).out, row(all.out), {kDim}));
    EXPECT_TRUE(SameBits(Normalise(*one_thread, 1, kDim, row(x), row(delta), weight).out, row(all.out), {kDim}));
  }
}

}  // namespace
}  // namespace memserve::kernels
