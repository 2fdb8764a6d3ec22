// What the contract tests share: the back ends they take, tensors on a device, inputs, and comparisons that name the worst element.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace memserve::kernels {

// reference, or cpu with so many threads and this instruction set.
struct BackendCase {
  std::string name;
  int threads = 1;
  std::string isa = "auto";
};
void PrintTo(const BackendCase& backend, std::ostream* out);

std::unique_ptr<Backend> Make(const BackendCase& backend);
std::vector<BackendCase> AllBackends();
// With one and two threads, and pinned to each instruction set that runs here.
std::vector<BackendCase> CpuBackends();

inline constexpr DType kRowFormats[] = {DType::kF32, DType::kBF16, DType::kI8, DType::kI4};

// What a table of `dim` columns holds of these values: value = scale of the row · code. Written from row_format.h, apart from its code.
struct StoredRows {
  std::vector<float> codes;   // [rows, dim]
  std::vector<float> scales;  // [rows]
};
StoredRows StoredAs(DType format, const std::vector<float>& values, int64_t dim);

// A test that every back end must pass.
class ContractTest : public testing::TestWithParam<BackendCase> {
 protected:
  ContractTest() : backend_(Make(GetParam())) {}
  Backend& backend() { return *backend_; }
  bool is_reference() { return backend_->name() == "reference"; }

 private:
  std::unique_ptr<Backend> backend_;
};

#define MEMSERVE_FOR_ALL_BACKENDS(suite)                                   \
  INSTANTIATE_TEST_SUITE_P(Every, suite, testing::ValuesIn(AllBackends()), \
                           [](const testing::TestParamInfo<BackendCase>& info) { return testing::PrintToString(info.param); })
#define MEMSERVE_FOR_CPU_BACKENDS(suite)                                   \
  INSTANTIATE_TEST_SUITE_P(Every, suite, testing::ValuesIn(CpuBackends()), \
                           [](const testing::TestParamInfo<BackendCase>& info) { return testing::PrintToString(info.param); })

// A tensor in device memory, followed by guard bytes. What was not written reads as NaN or −1.
template <typename T, int rank>
class DeviceTensor {
 public:
  using Shape = std::array<int64_t, rank>;

  DeviceTensor(Backend& backend, Shape shape) : backend_(&backend), shape_(shape) {
    const std::vector<unsigned char> filled(bytes() + kGuard, 0xff);
    memory_ = *backend.Allocate(bytes() + kGuard, "test");
    backend.CopyToDevice(memory_.address(), filled.data(), bytes() + kGuard);
  }
  DeviceTensor(Backend& backend, Shape shape, const std::vector<T>& values) : DeviceTensor(backend, shape) {
    MEMSERVE_CHECK_EQ(static_cast<int64_t>(values.size()), view().size());
    backend.CopyToDevice(memory_.address(), values.data(), bytes());
  }

  TensorView<T, rank> view() const { return {static_cast<T*>(memory_.address()), shape_}; }
  operator TensorView<T, rank>() const { return view(); }        // NOLINT(google-explicit-constructor)
  operator TensorView<const T, rank>() const { return view(); }  // NOLINT(google-explicit-constructor)
  std::vector<int64_t> shape() const { return {shape_.begin(), shape_.end()}; }

  std::vector<T> Read() const {
    backend_->Wait(backend_->Record());
    std::vector<T> values(view().size());
    std::vector<unsigned char> guard(kGuard);
    backend_->CopyToHost(values.data(), memory_.address(), bytes());
    backend_->CopyToHost(guard.data(), static_cast<char*>(memory_.address()) + bytes(), kGuard);
    EXPECT_THAT(guard, testing::Each(0xff)) << "written beyond the end";
    return values;
  }

 private:
  static constexpr int64_t kGuard = 256;
  int64_t bytes() const { return view_size() * static_cast<int64_t>(sizeof(T)); }
  int64_t view_size() const {
    int64_t size = 1;
    for (int64_t extent : shape_) size *= extent;
    return size;
  }

  Backend* backend_;
  Shape shape_;
  DeviceBuffer memory_;
};

// Inputs, the same for the same seed.
std::vector<float> Reals(int seed, int64_t count, float low = -1, float high = 1);
// Small enough that sums of products are exact in float32 and each is exact in bf16.
std::vector<float> Integers(int seed, int64_t count, int low = -4, int high = 4);
std::vector<int32_t> Indices(int seed, int64_t count, int32_t low, int32_t high);  // both inclusive
std::vector<float> RoundedTo(DType dtype, std::vector<float> values);
std::vector<float> Absolute(std::vector<float> values);

std::unique_ptr<WeightMatrix> NewWeights(Backend& backend, const WeightMatrixSpec& spec, const std::vector<float>& values);
std::unique_ptr<RowStore> NewTable(Backend& backend, const RowStoreSpec& spec, const std::vector<float>& values);

inline constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

// Every element within its tolerance (NaN only where NaN is expected); says which is worst, and where.
testing::AssertionResult Near(const std::vector<float>& actual, const std::vector<float>& expected,
                              const std::vector<double>& tolerance, const std::vector<int64_t>& shape);
testing::AssertionResult Near(const std::vector<float>& actual, const std::vector<float>& expected, double tolerance,
                              const std::vector<int64_t>& shape);
// Tolerance: so many epsilons of the expected value itself.
testing::AssertionResult NearRelative(const std::vector<float>& actual, const std::vector<float>& expected, double epsilons,
                                      const std::vector<int64_t>& shape);
testing::AssertionResult SameBits(const std::vector<float>& actual, const std::vector<float>& expected,
                                  const std::vector<int64_t>& shape);

}  // namespace memserve::kernels
