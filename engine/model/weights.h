// From the tensors of a checkpoint to weights on a device.
//
// The same walk over the model runs twice: first to plan (no back end: names, shapes and bytes are checked and counted, nothing is
// allocated), then to load (allocated and queued, read in parallel by Run). So the plan cannot differ from what is done.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/checkpoint.h"
#include "engine/model/tensor_names.h"
#include "kernels/backend.h"

namespace memserve::engine {

// Element types as held, resolved: none is "auto".
struct WeightTypes {
  kernels::DType weight = kernels::DType::kF32;
  kernels::DType activation = kernels::DType::kF32;
  kernels::DType table = kernels::DType::kF32;
};

// Indices [begin, end).
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

// Part `index` of `parts` of [0, total), in whole units of `unit` (the last part may end on a broken one). Sizes differ by at most
// one unit.
Range PartOf(int64_t total, int64_t unit, int index, int parts);

// A vector on the device, as float32.
struct Vector {
  kernels::DeviceBuffer buffer;
  int64_t size = 0;
  kernels::TensorView<const float, 1> view() const {
    return {static_cast<const float*>(buffer.address()), {buffer.address() == nullptr ? 0 : size}};
  }
};

using Matrix = std::unique_ptr<kernels::WeightMatrix>;

// Names of tensors are the engine's own (see tensor_names.h) in calls, and the checkpoint's in messages and results.
class WeightLoader {
 public:
  // `backend` null: only plan.
  WeightLoader(const Checkpoint& checkpoint, const TensorNames& names, const WeightTypes& types, kernels::Backend* backend)
      : checkpoint_(checkpoint), names_(names), types_(types), backend_(backend) {}

  bool planning() const { return backend_ == nullptr; }
  const WeightTypes& types() const { return types_; }
  bool Has(const std::string& name) const { return checkpoint_.Find(names_.Stored(name)) != nullptr; }

  // Rows `rows` and columns `columns` of the tensor `name`, which must be [n, k]. With groups > 1 the tensor is [groups · n, k] and
  // is taken whole. Null while planning. NOT_FOUND, INVALID_ARGUMENT: one line with tensor, expected and found.
  absl::StatusOr<Matrix> LoadMatrix(const std::string& name, int64_t n, int64_t k, Range rows, Range columns, int64_t groups = 1);

  // Elements `range` of the tensor [n].
  absl::StatusOr<Vector> LoadVector(const std::string& name, int64_t n, Range range);

  // Columns `columns` of all rows of a value table: [rows, dim] in f32, bf16, f16 or I8, or [rows, ⌈dim / 2⌉] in U8, which holds
  // int4 (see kernels/row_format.h); the last two come with `scales` [rows], f32. Null while planning.
  absl::StatusOr<std::shared_ptr<kernels::RowStore>> LoadRows(const std::string& name, const std::string& scales, int64_t rows,
                                                              int64_t dim, Range columns);

  // Marks a tensor as known and not needed.
  void Ignore(const std::string& name) { used_.insert(names_.Stored(name)); }

  // Reads all that was queued, with `threads` threads.
  absl::Status Run(int threads);

  // Of this device, once each.
  int64_t weight_bytes() const { return weight_bytes_; }
  int64_t table_bytes() const { return table_bytes_; }
  std::vector<std::string> UnusedTensors() const;

  // What was read: bytes, and values that are NaN or infinite by tensor.
  int64_t read_bytes() const { return read_bytes_; }
  const std::map<std::string, int64_t>& not_finite() const { return not_finite_; }

 private:
  // Rows of one tensor on their way to where they are held. Threads take it in chunks.
  struct Job {
    const TensorInfo* tensor;
    int64_t first_row = 0;  // in the tensor
    int64_t row_count;
    int64_t row_values;                       // in the tensor
    kernels::WeightMatrix* matrix = nullptr;  // either this,
    int64_t group = 0;
    Range columns;
    kernels::RowStore* rows = nullptr;   // or this,
    const TensorInfo* scales = nullptr;  //   with these where its rows are quantised
    int64_t row_bytes = 0;               // in the file
    int64_t chunk_rows = 0;
    int64_t first_chunk = 0;  // among those of all jobs

    int64_t chunks() const { return (row_count + chunk_rows - 1) / chunk_rows; }
  };
  // A thread's own memory.
  struct Staging {
    std::vector<char> read;
    std::vector<float> widened;
    std::map<std::string, int64_t> not_finite;
  };

  absl::StatusOr<const TensorInfo*> Expect(const std::string& name, const std::vector<int64_t>& shape);
  absl::StatusOr<const TensorInfo*> ExpectRows(const std::string& name, int64_t rows, int64_t dim);
  void AddJob(Job job);
  absl::Status RunChunk(int64_t chunk, Staging& staging) const;
  absl::Status RunMatrix(const Job& job, int64_t first_row, int64_t row_count, Staging& staging) const;
  absl::Status RunRows(const Job& job, int64_t first_row, int64_t row_count, Staging& staging) const;
  absl::Status Read(const TensorInfo& tensor, int64_t begin, int64_t bytes, void* out, Staging& staging) const;

  const Checkpoint& checkpoint_;
  const TensorNames names_;
  const WeightTypes types_;
  kernels::Backend* const backend_;
  std::vector<Job> jobs_;
  int64_t chunks_ = 0;  // of all jobs
  std::set<std::string> used_;
  int64_t weight_bytes_ = 0;
  int64_t table_bytes_ = 0;
  int64_t read_bytes_ = 0;
  std::map<std::string, int64_t> not_finite_;
};

}  // namespace memserve::engine
