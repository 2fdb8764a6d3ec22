#include "kernels/matmul.h"

#include <cmath>

#include "tests/kernels/contract.h"

namespace memserve::kernels {
namespace {

struct Types {
  DType weight;
  DType activation;
};
constexpr Types kTypes[] = {{DType::kF32, DType::kF32}, {DType::kBF16, DType::kF32}, {DType::kBF16, DType::kBF16}};

struct Shape {
  int64_t n;
  int64_t k;
};
constexpr Shape kShapes[] = {{1, 1},   {1, 20},  {3, 3},    {15, 64},   {16, 8},  {17, 129},
                             {33, 20}, {100, 1}, {129, 32}, {1001, 77}, {64, 511}};

// out = x · weightᵀ + bias, for m rows.
std::vector<float> Multiply(Backend& backend, const WeightMatrix& weight, const std::vector<float>& x,
                            const std::vector<float>& bias) {
  const int64_t n = weight.spec().n, k = weight.spec().k, m = static_cast<int64_t>(x.size()) / k;
  const DeviceTensor<float, 2> out(backend, {m, n});
  const DeviceTensor<float, 2> device_x(backend, {m, k}, x);
  const DeviceTensor<float, 1> device_bias(backend, {static_cast<int64_t>(bias.size())}, bias);
  MatMulArgs args{.x = device_x, .weight = &weight, .out = out};
  if (!bias.empty()) args.bias = device_bias;
  backend.MatMul(args);
  return out.Read();
}

class MatMulTest : public ContractTest {};
MEMSERVE_FOR_ALL_BACKENDS(MatMulTest);

TEST_P(MatMulTest, MultipliesRowsWithRows) {
  const auto weight = NewWeights(backend(), {.n = 2, .k = 3}, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(Multiply(backend(), *weight, {1, 0, -1, 2, 2, 2}, {}), (std::vector<float>{-2, -2, 12, 30}));
  EXPECT_EQ(Multiply(backend(), *weight, {1, 0, -1, 2, 2, 2}, {10, 20}), (std::vector<float>{8, 18, 22, 50}));
}

TEST_P(MatMulTest, RoundsInputsToTheActivationTypeFirst) {
  const float x = 1 + 0x1p-8f + 0x1p-20f;  // to 1 + 2^-7 in bf16
  const auto wide = NewWeights(backend(), {.n = 1, .k = 1, .dtype = DType::kBF16, .activation = DType::kF32}, {1});
  const auto narrow = NewWeights(backend(), {.n = 1, .k = 1, .dtype = DType::kBF16, .activation = DType::kBF16}, {1});
  EXPECT_EQ(Multiply(backend(), *wide, {x}, {}), std::vector<float>{x});
  EXPECT_EQ(Multiply(backend(), *narrow, {x}, {}), std::vector<float>{1 + 0x1p-7f});
}

TEST_P(MatMulTest, IsExactOnSmallIntegers) {
  for (const Types& types : kTypes) {
    for (const Shape& shape : kShapes) {
      const std::vector<float> w = Integers(1, shape.n * shape.k), bias = Integers(3, shape.n);
      const auto weight =
          NewWeights(backend(), {.n = shape.n, .k = shape.k, .dtype = types.weight, .activation = types.activation}, w);
      for (int64_t m : {0, 1, 2, 3, 5, 9}) {
        const std::vector<float> x = Integers(m, m * shape.k);
        std::vector<float> expected(m * shape.n);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t n = 0; n < shape.n; ++n) {
            double sum = bias[n];
            for (int64_t k = 0; k < shape.k; ++k) sum += x[i * shape.k + k] * w[n * shape.k + k];
            expected[i * shape.n + n] = sum;
          }
        }
        EXPECT_TRUE(SameBits(Multiply(backend(), *weight, x, bias), expected, {m, shape.n}))
            << "m " << m << ", n " << shape.n << ", k " << shape.k << ", " << NameOf(types.weight) << " weights";
      }
    }
  }
}

// Within terms × epsilon × Σ|x w| of the reference, and the very bits of one chain of fused multiply-adds.
TEST_P(MatMulTest, IsOneChainOfFusedMultiplyAdds) {
  const auto reference = NewReferenceBackend();
  for (const Types& types : kTypes) {
    for (const Shape& shape : kShapes) {
      constexpr int64_t kM = 5;
      const WeightMatrixSpec spec{.n = shape.n, .k = shape.k, .dtype = types.weight, .activation = types.activation};
      const std::vector<float> w = Reals(1, shape.n * shape.k), x = Reals(2, kM * shape.k), bias = Reals(3, shape.n);
      const std::vector<float> actual = Multiply(backend(), *NewWeights(backend(), spec, w), x, bias);
      const std::vector<float> expected = Multiply(*reference, *NewWeights(*reference, spec, w), x, bias);
      const std::vector<float> bound =
          Multiply(*reference, *NewWeights(*reference, spec, Absolute(w)), Absolute(x), Absolute(bias));
      std::vector<double> tolerance;
      for (float b : bound) tolerance.push_back((shape.k + 1) * kEpsilon * b);
      EXPECT_TRUE(Near(actual, expected, tolerance, {kM, shape.n})) << "n " << shape.n << ", k " << shape.k;
      if (is_reference()) continue;

      const std::vector<float> held = RoundedTo(types.weight, w), rounded_x = RoundedTo(types.activation, x);
      std::vector<float> chain(kM * shape.n);
      for (int64_t m = 0; m < kM; ++m) {
        for (int64_t n = 0; n < shape.n; ++n) {
          float sum = 0;
          for (int64_t k = 0; k < shape.k; ++k) sum = std::fma(rounded_x[m * shape.k + k], held[n * shape.k + k], sum);
          chain[m * shape.n + n] = sum + bias[n];
        }
      }
      EXPECT_TRUE(SameBits(actual, chain, {kM, shape.n}))
          << "n " << shape.n << ", k " << shape.k << ", " << NameOf(types.weight) << " weights, " << NameOf(types.activation);
    }
  }
}

TEST_P(MatMulTest, GivesARowTheSameBitsAtEveryNumberOfRowsAndThreads) {
  if (is_reference()) GTEST_SKIP() << "plain loops have no neighbours";
  const auto other_threads = Make({"cpu", GetParam().threads == 1 ? 3 : 1, GetParam().isa});
  for (const Types& types : kTypes) {
    for (const Shape& shape : {Shape{33, 20}, Shape{129, 257}, Shape{1000, 64}, Shape{48, 1030}}) {
      const WeightMatrixSpec spec{.n = shape.n, .k = shape.k, .dtype = types.weight, .activation = types.activation};
      const std::vector<float> w = Reals(1, shape.n * shape.k), x = Reals(2, 130 * shape.k), bias = Reals(3, shape.n);
      const auto weight = NewWeights(backend(), spec, w), other_weight = NewWeights(*other_threads, spec, w);
      const std::vector<float> all = Multiply(backend(), *weight, x, bias);
      for (int64_t m : {1, 2, 3, 4, 5, 7, 8, 15, 16, 33, 64, 129}) {
        for (int64_t first : {int64_t{0}, 130 - m}) {
          const std::vector<float> some(x.begin() + first * shape.k, x.begin() + (first + m) * shape.k);
          const std::vector<float> expected(all.begin() + first * shape.n, all.begin() + (first + m) * shape.n);
          EXPECT_TRUE(SameBits(Multiply(backend(), *weight, some, bias), expected, {m, shape.n})) << "rows " << first << " + " << m;
          EXPECT_TRUE(SameBits(Multiply(*other_threads, *other_weight, some, bias), expected, {m, shape.n}))
              << "other threads, rows " << first << " + " << m;
        }
      }
    }
  }
}

TEST_P(MatMulTest, LetsAnInfinityAndANanHarmTheirOwnRowOnly) {
  const auto weight = NewWeights(backend(), {.n = 20, .k = 3}, Reals(1, 60));
  std::vector<float> x = Reals(2, 4 * 3);
  const std::vector<float> clean = Multiply(backend(), *weight, x, {});
  x[3] = std::numeric_limits<float>::infinity();
  x[10] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> out = Multiply(backend(), *weight, x, {});
  for (int64_t n = 0; n < 20; ++n) {
    EXPECT_EQ(out[n], clean[n]);
    EXPECT_TRUE(std::isinf(out[20 + n]));
    EXPECT_EQ(out[40 + n], clean[40 + n]);
    EXPECT_TRUE(std::isnan(out[60 + n]));
  }
}

}  // namespace
}  // namespace memserve::kernels
