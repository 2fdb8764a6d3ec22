// A weight matrix (or a group of equal ones) in the layout that its back end wants. Packed once at load, read-only afterwards.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/tensor.h"

namespace memserve::kernels {

struct WeightMatrixSpec {
  int64_t groups = 1;                 // equal matrices side by side (half keys: mem_heads * 2); 1 for a plain matrix
  int64_t n = 0;                      // rows of each: outputs
  int64_t k = 0;                      // columns of each: inputs
  DType dtype = DType::kF32;          // as held: f32 or bf16. Storing f32 into bf16 rounds to nearest even
  DType activation = DType::kF32;     // inputs of products are rounded to this first (bf16 only with bf16 weights)
};

// Thread-safe for Store calls on disjoint rows; everything after the last Store only reads.
class WeightMatrix {
 public:
  explicit WeightMatrix(const WeightMatrixSpec& spec) : spec_(spec) {}
  virtual ~WeightMatrix() = default;
  WeightMatrix(const WeightMatrix&) = delete;
  WeightMatrix& operator=(const WeightMatrix&) = delete;

  const WeightMatrixSpec& spec() const { return spec_; }

  // Copies `count` rows of group `group`, starting at `first_row`. Host rows of spec().k values of `source` (f32 or bf16)
  // lie `source_stride` values apart. Threads may store disjoint ranges at once when they begin at multiples of kStoreRows.
  static constexpr int64_t kStoreRows = 64;
  virtual void Store(int64_t group, int64_t first_row, int64_t count, const void* rows, DType source,
                     int64_t source_stride) = 0;

  virtual int64_t bytes() const = 0;  // held on the device, padding included

 private:
  const WeightMatrixSpec spec_;
};

// What NewWeightMatrix(spec) will hold, for the start plan.
int64_t PlannedBytes(const WeightMatrixSpec& spec);

}  // namespace memserve::kernels
