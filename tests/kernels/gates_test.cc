#include "kernels/gates.h"

#include <cmath>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

class SiluProductTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(SiluProductTest);

TEST_P(SiluProductTest, MultipliesTheGatedInput) {
  for (auto [num_tokens, n] : {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {1, 16}, {3, 7}, {5, 33}, {2, 1000}}) {
    std::vector<float> a = Reals(1, num_tokens * n, -20, 20), b = Reals(2, num_tokens * n), expected;
    for (size_t i = 0; i < a.size(); ++i) expected.push_back(a[i] * Sigmoid(a[i]) * b[i]);
    const DeviceTensor<float, 2> out(backend(), {num_tokens, n});
    backend().SiluProduct({.a = DeviceTensor<float, 2>(backend(), {num_tokens, n}, a),
                           .b = DeviceTensor<float, 2>(backend(), {num_tokens, n}, b),
                           .out = out});
    EXPECT_TRUE(NearRelative(out.Read(), expected, 16, out.shape())) << num_tokens << " × " << n;
  }
}

TEST_P(SiluProductTest, MayWriteOverEitherInput) {
  const std::vector<float> a = Reals(1, 3 * 21), b = Reals(2, 3 * 21);
  const DeviceTensor<float, 2> over_a(backend(), {3, 21}, a), over_b(backend(), {3, 21}, b), apart(backend(), {3, 21});
  const DeviceTensor<float, 2> device_a(backend(), {3, 21}, a), device_b(backend(), {3, 21}, b);
  backend().SiluProduct({.a = device_a, .b = device_b, .out = apart});
  backend().SiluProduct({.a = over_a, .b = device_b, .out = over_a});
  backend().SiluProduct({.a = device_a, .b = over_b, .out = over_b});
  EXPECT_TRUE(SameBits(over_a.Read(), apart.Read(), apart.shape()));
  EXPECT_TRUE(SameBits(over_b.Read(), apart.Read(), apart.shape()));
}

TEST_P(SiluProductTest, SurvivesLargeInputs) {
  const DeviceTensor<float, 2> a(backend(), {1, 4}, {-1000, -100, 100, 1000}), b(backend(), {1, 4}, {1, 1, 1, 1});
  const DeviceTensor<float, 2> out(backend(), {1, 4});
  backend().SiluProduct({.a = a, .b = b, .out = out});
  EXPECT_TRUE(Near(out.Read(), {0, 0, 100, 1000}, 1e-4, out.shape()));
}

TEST_P(SiluProductTest, GivesEqualElementsEqualBits) {
  constexpr int64_t kN = 53;
  const DeviceTensor<float, 2> a(backend(), {3, kN}, std::vector<float>(3 * kN, 0.37f)), out(backend(), {3, kN});
  backend().SiluProduct({.a = a, .b = a, .out = out});
  EXPECT_THAT(out.Read(), testing::Each(out.Read()[0]));
}

class SigmoidGateTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(SigmoidGateTest);

TEST_P(SigmoidGateTest, ScalesATokenByItsGate) {
  for (auto [num_tokens, n] : {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {3, 7}, {5, 33}, {2, 1000}}) {
    std::vector<float> gate = Reals(1, num_tokens, -8, 8), x = Reals(2, num_tokens * n), expected;
    for (size_t i = 0; i < x.size(); ++i) expected.push_back(Sigmoid(gate[i / n]) * x[i]);
    const DeviceTensor<float, 2> device_x(backend(), {num_tokens, n}, x);
    backend().SigmoidGate({.gate = DeviceTensor<float, 2>(backend(), {num_tokens, 1}, gate), .x = device_x});
    EXPECT_TRUE(NearRelative(device_x.Read(), expected, 8, device_x.shape())) << num_tokens << " × " << n;
  }
}

TEST_P(SigmoidGateTest, ClosesAndOpensFully) {
  const DeviceTensor<float, 2> gate(backend(), {2, 1}, {-500, 500}), x(backend(), {2, 1}, {3, 3});
  backend().SigmoidGate({.gate = gate, .x = x});
  EXPECT_EQ(x.Read(), (std::vector<float>{0, 3}));
}

}  // namespace
}  // namespace memserve::kernels
