// What the benchmarks share: back end and limits, tensors, timing and printing.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/flags/declare.h"
#include "absl/flags/flag.h"
#include "absl/strings/str_format.h"
#include "kernels/backend.h"
#include "tests/bench/limits.h"

namespace memserve::bench {

using kernels::Backend;
using kernels::DType;
using kernels::TensorView;

// A tensor in device memory.
template <typename T, int rank>
struct Tensor {
  kernels::DeviceBuffer memory;
  TensorView<T, rank> view;
};

class Bench {
 public:
  // Opens the cpu back end with --threads and --isa, and measures the limits. Ends the process with one line if it cannot.
  explicit Bench(std::string name);

  Backend& backend() { return *backend_; }
  const std::vector<int64_t>& batches() const { return batches_; }  // --batch
  std::mt19937_64& random() { return random_; }

  // How many copies of something so large to take turns with, so that each is cold when its turn comes: see --cold_bytes.
  static int64_t ColdCopies(int64_t bytes);

  template <typename T, int rank>
  Tensor<T, rank> New(std::array<int64_t, rank> shape) {
    int64_t bytes = sizeof(T);
    for (int64_t extent : shape) bytes *= extent;
    kernels::DeviceBuffer memory = Allocate(bytes);
    return {memory, {static_cast<T*>(memory.address()), shape}};
  }
  template <typename T, int rank>
  Tensor<T, rank> New(std::array<int64_t, rank> shape, const std::vector<T>& values) {
    Tensor<T, rank> tensor = New<T, rank>(shape);
    Copy(tensor, values);
    return tensor;
  }
  template <typename T, int rank>
  void Copy(Tensor<T, rank>& tensor, const std::vector<T>& values) {
    backend().CopyToDevice(tensor.view.data, values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
  }

  std::vector<float> Reals(int64_t count, float low = -1, float high = 1);
  std::vector<int32_t> Indices(int64_t count, int64_t end);  // each in [0, end)
  std::unique_ptr<kernels::WeightMatrix> NewWeights(const kernels::WeightMatrixSpec& spec);
  std::unique_ptr<kernels::RowStore> NewTable(const kernels::RowStoreSpec& spec);

  // Times --repeat runs and prints a line. `prepare` is called before each run and not timed.
  void Report(const std::string& shape, int64_t batch, double bytes, double flops, const std::function<void(int64_t)>& prepare,
              const std::function<void(int64_t)>& run);

 private:
  kernels::DeviceBuffer Allocate(int64_t bytes);

  const std::string name_;
  std::unique_ptr<Backend> backend_;
  Limits limits_;
  std::vector<int64_t> batches_;
  std::mt19937_64 random_{1};
};

// A shape flag, or the operation's own default where it is 0.
int64_t ShapeOf(const absl::Flag<int64_t>& flag, int64_t fallback);
DType Format();     // --format
DType RowFormat();  // the same for rows of a value table, which may be quantised

}  // namespace memserve::bench

ABSL_DECLARE_FLAG(int64_t, rows);
ABSL_DECLARE_FLAG(int64_t, dim);
ABSL_DECLARE_FLAG(int64_t, bag);
ABSL_DECLARE_FLAG(int64_t, n);
ABSL_DECLARE_FLAG(int64_t, k);
ABSL_DECLARE_FLAG(int64_t, vocab);
ABSL_DECLARE_FLAG(int64_t, heads);
ABSL_DECLARE_FLAG(int64_t, kv_heads);
ABSL_DECLARE_FLAG(int64_t, head_dim);
ABSL_DECLARE_FLAG(int64_t, context);
ABSL_DECLARE_FLAG(int64_t, queries);
ABSL_DECLARE_FLAG(int64_t, n_keys);
ABSL_DECLARE_FLAG(int64_t, half_dim);
ABSL_DECLARE_FLAG(int64_t, knn);
