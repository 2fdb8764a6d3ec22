#include "engine/model/weights.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/sync.h"

namespace memserve::engine {
namespace {

using kernels::DType;

// Large enough to read at full speed, small enough that staging does not count.
constexpr int64_t kJobBytes = 1 << 20;

int64_t RowsPerJob(int64_t row_bytes) {
  const int64_t unit = kernels::WeightMatrix::kStoreRows;
  return std::max<int64_t>(1, kJobBytes / std::max<int64_t>(1, row_bytes) / unit) * unit;
}

// What rows of a tensor of this type are: bytes hold two codes of int4 each.
DType RowFormatOf(DType tensor) { return tensor == DType::kU8 ? DType::kI4 : tensor; }

}  // namespace

Range PartOf(int64_t total, int64_t unit, int index, int parts) {
  const int64_t units = (total + unit - 1) / unit;
  const auto boundary = [&](int64_t i) { return std::min(total, units * i / parts * unit); };
  return {boundary(index), boundary(index + 1)};
}

absl::StatusOr<const TensorInfo*> WeightLoader::Expect(const std::string& name, const std::vector<int64_t>& shape) {
  const TensorInfo* tensor = checkpoint_.Find(name);
  if (tensor == nullptr) {
    return absl::NotFoundError(absl::StrCat(checkpoint_.folder(), ": tensor '", name, "' is missing; config.json asks for [",
                                            absl::StrJoin(shape, ", "), "]"));
  }
  if (tensor->shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat(checkpoint_.folder(), ": tensor '", name, "' is ", Describe(*tensor),
                                                   "; config.json asks for [", absl::StrJoin(shape, ", "), "]"));
  }
  if (tensor->dtype != DType::kF32 && tensor->dtype != DType::kBF16) {
    return absl::InvalidArgumentError(
        absl::StrCat(checkpoint_.folder(), ": tensor '", name, "' is ", Describe(*tensor), "; weights are f32 or bf16"));
  }
  used_.insert(name);
  return tensor;
}

absl::StatusOr<Matrix> WeightLoader::LoadMatrix(const std::string& name, int64_t n, int64_t k, Range rows, Range columns,
                                                int64_t groups) {
  absl::StatusOr<const TensorInfo*> tensor = Expect(name, {groups * n, k});
  if (!tensor.ok()) return tensor.status();
  const kernels::WeightMatrixSpec spec = {
      .groups = groups, .n = rows.size(), .k = columns.size(), .dtype = types_.weight, .activation = types_.activation};
  weight_bytes_ += kernels::PlannedBytes(spec);
  if (planning()) return Matrix();
  absl::StatusOr<Matrix> matrix = backend_->NewWeightMatrix(spec);
  if (!matrix.ok()) return matrix.status();
  const int64_t step = RowsPerJob(k * kernels::SizeOf((*tensor)->dtype));
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t row = 0; row < rows.size(); row += step) {
      jobs_.push_back({.tensor = *tensor,
                       .first_row = group * n + rows.begin + row,
                       .row_count = std::min(step, rows.size() - row),
                       .row_values = k,
                       .matrix = matrix->get(),
                       .group = group,
                       .matrix_row = row,
                       .columns = columns});
    }
  }
  return matrix;
}

absl::StatusOr<Vector> WeightLoader::LoadVector(const std::string& name, int64_t n, Range range) {
  absl::StatusOr<const TensorInfo*> tensor = Expect(name, {n});
  if (!tensor.ok()) return tensor.status();
  Vector vector;
  vector.size = range.size();
  weight_bytes_ += range.size() * static_cast<int64_t>(sizeof(float));
  if (planning() || range.size() == 0) return vector;
  std::vector<char> raw((*tensor)->bytes);
  if (absl::Status s = checkpoint_.Read(**tensor, 0, (*tensor)->bytes, raw.data()); !s.ok()) return s;
  std::vector<float> values(range.size());
  for (int64_t i = 0; i < range.size(); ++i) {
    values[i] = (*tensor)->dtype == DType::kF32
                    ? reinterpret_cast<const float*>(raw.data())[range.begin + i]
                    : kernels::ToFloat(reinterpret_cast<const kernels::BFloat16*>(raw.data())[range.begin + i]);
  }
  absl::StatusOr<kernels::DeviceBuffer> buffer = backend_->Allocate(range.size() * sizeof(float), name);
  if (!buffer.ok()) return buffer.status();
  backend_->CopyToDevice(buffer->address(), values.data(), range.size() * sizeof(float));
  backend_->Wait(backend_->Record());
  vector.buffer = *std::move(buffer);
  return vector;
}

absl::StatusOr<const TensorInfo*> WeightLoader::ExpectRows(const std::string& name, int64_t rows, int64_t dim) {
  const TensorInfo* tensor = checkpoint_.Find(name);
  if (tensor == nullptr || (tensor->dtype != DType::kI8 && tensor->dtype != DType::kU8)) return Expect(name, {rows, dim});
  const int64_t columns = kernels::RowBytes(RowFormatOf(tensor->dtype), dim);
  if (tensor->shape != std::vector<int64_t>{rows, columns}) {
    return absl::InvalidArgumentError(absl::StrCat(checkpoint_.folder(), ": tensor '", name, "' is ", Describe(*tensor),
                                                   "; config.json asks for [", rows, ", ", dim, "], in ",
                                                   kernels::NameOf(RowFormatOf(tensor->dtype)), " [", rows, ", ", columns, "]"));
  }
  used_.insert(name);
  return tensor;
}

absl::StatusOr<std::shared_ptr<kernels::RowStore>> WeightLoader::LoadRows(const std::string& name, const std::string& scales,
                                                                          int64_t rows, int64_t dim, Range columns) {
  absl::StatusOr<const TensorInfo*> tensor = ExpectRows(name, rows, dim);
  if (!tensor.ok()) return tensor.status();
  const DType format = RowFormatOf((*tensor)->dtype);
  const TensorInfo* scale_tensor = nullptr;
  if (kernels::HasScales(format)) {
    absl::StatusOr<const TensorInfo*> found = Expect(scales, {rows});
    if (!found.ok()) return found.status();
    scale_tensor = *found;
    if (scale_tensor->dtype != DType::kF32) {
      return absl::InvalidArgumentError(
          absl::StrCat(checkpoint_.folder(), ": tensor '", scales, "' is ", Describe(*scale_tensor), "; scales of rows are f32"));
    }
  }
  table_bytes_ += rows * (kernels::RowBytes(types_.table, columns.size()) + (kernels::HasScales(types_.table) ? 4 : 0));
  if (planning()) return std::shared_ptr<kernels::RowStore>();
  absl::StatusOr<std::unique_ptr<kernels::RowStore>> store = backend_->NewRowStore(
      {.rows = rows, .dim = dim, .first_column = columns.begin, .end_column = columns.end, .format = types_.table});
  if (!store.ok()) return store.status();
  const int64_t step = RowsPerJob(kernels::RowBytes(format, dim));
  for (int64_t row = 0; row < rows; row += step) {
    jobs_.push_back({.tensor = *tensor,
                     .first_row = row,
                     .row_count = std::min(step, rows - row),
                     .row_values = dim,
                     .rows = store->get(),
                     .scales = scale_tensor});
  }
  return std::shared_ptr<kernels::RowStore>(*std::move(store));
}

absl::Status WeightLoader::RunRows(const Job& job, std::vector<char>& staging) const {
  const DType format = RowFormatOf(job.tensor->dtype);
  const int64_t row_bytes = kernels::RowBytes(format, job.row_values);
  const int64_t begin = job.first_row * row_bytes, bytes = job.row_count * row_bytes;
  const int64_t scale_bytes = job.scales == nullptr ? 0 : job.row_count * static_cast<int64_t>(sizeof(float));
  const bool direct = job.rows->DirectRows() != nullptr && job.rows->spec().format == format;
  if (!direct) staging.resize(std::max<size_t>(staging.size(), bytes + scale_bytes));
  // Scales first: they stay aligned.
  float* scales = direct ? job.rows->DirectScales() + (job.scales == nullptr ? 0 : job.first_row) : reinterpret_cast<float*>(staging.data());
  if (job.scales != nullptr) {
    const int64_t first = job.first_row * static_cast<int64_t>(sizeof(float));
    if (absl::Status s = checkpoint_.Read(*job.scales, first, scale_bytes, scales); !s.ok()) return s;
  }
  void* rows = direct ? static_cast<char*>(job.rows->DirectRows()) + begin : staging.data() + scale_bytes;
  if (absl::Status s = checkpoint_.Read(*job.tensor, begin, bytes, rows); !s.ok()) return s;
  if (!direct) job.rows->Store(job.first_row, job.row_count, rows, format, scales);
  return absl::OkStatus();
}

absl::Status WeightLoader::RunJob(const Job& job, std::vector<char>& staging) const {
  if (job.rows != nullptr) return RunRows(job, staging);
  const DType dtype = job.tensor->dtype;
  const int64_t row_bytes = job.row_values * kernels::SizeOf(dtype);
  const int64_t bytes = job.row_count * row_bytes;
  staging.resize(std::max<size_t>(staging.size(), bytes));
  if (absl::Status s = checkpoint_.Read(*job.tensor, job.first_row * row_bytes, bytes, staging.data()); !s.ok()) return s;
  job.matrix->Store(job.group, job.matrix_row, job.row_count, staging.data() + job.columns.begin * kernels::SizeOf(dtype), dtype,
                    job.row_values);
  return absl::OkStatus();
}

absl::Status WeightLoader::Run(int threads) {
  std::atomic<size_t> next = 0;
  kernels::Mutex mutex;
  absl::Status first_error;
  const auto work = [&] {
    std::vector<char> staging;
    for (size_t i = next++; i < jobs_.size(); i = next++) {
      absl::Status status = RunJob(jobs_[i], staging);
      if (status.ok()) continue;
      kernels::MutexLock lock(mutex);
      if (first_error.ok()) first_error = status;
      next = jobs_.size();
    }
  };
  const int helpers = std::min<int>(threads, static_cast<int>(jobs_.size())) - 1;
  std::vector<std::thread> pool;
  for (int i = 0; i < helpers; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
  jobs_.clear();
  return first_error;
}

std::vector<std::string> WeightLoader::UnusedTensors() const {
  std::vector<std::string> unused;
  for (const auto& [name, tensor] : checkpoint_.tensors()) {
    if (!used_.contains(name)) unused.push_back(name);
  }
  return unused;
}

}  // namespace memserve::engine
