#include "engine/model/weights.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/model/finite.h"
#include "kernels/sync.h"

namespace memserve::engine {
namespace {

using kernels::DType;

// What a thread takes at a time: whole huge pages, so that no two threads touch one for the first time.
constexpr int64_t kChunkBytes = 8 << 20;
// What it reads at a time: large enough for full speed, small enough to be in the cache when it is looked at or converted, and so
// that staging does not count.
constexpr int64_t kPieceBytes = 256 << 10;
constexpr int64_t kPanelRows = 16;  // that back ends pack together

// Rows of so many bytes together, in whole units, at least one.
int64_t RowsIn(int64_t bytes, int64_t row_bytes, int64_t unit) {
  return std::max<int64_t>(1, bytes / std::max<int64_t>(1, row_bytes) / unit) * unit;
}

float ValueAt(DType dtype, const void* values, int64_t i) {
  switch (dtype) {
    case DType::kBF16:
      return kernels::ToFloat(static_cast<const kernels::BFloat16*>(values)[i]);
    case DType::kF16:
      return kernels::ToFloat(static_cast<const kernels::Float16*>(values)[i]);
    default:
      return static_cast<const float*>(values)[i];
  }
}

// Halves become floats here: no back end holds them.
const float* Widen(const void* halves, int64_t count, std::vector<float>& widened) {
  widened.resize(std::max<size_t>(widened.size(), count));
  for (int64_t i = 0; i < count; ++i) widened[i] = kernels::ToFloat(static_cast<const kernels::Float16*>(halves)[i]);
  return widened.data();
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
  const std::string stored = names_.Stored(name);
  const TensorInfo* tensor = checkpoint_.Find(stored);
  if (tensor == nullptr) {
    return absl::NotFoundError(absl::StrCat(checkpoint_.folder(), ": tensor '", stored, "' is missing; config.json asks for [",
                                            absl::StrJoin(shape, ", "), "]"));
  }
  if (tensor->shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat(checkpoint_.path(*tensor), ": tensor '", stored, "' is ", Describe(*tensor),
                                                   "; config.json asks for [", absl::StrJoin(shape, ", "), "]"));
  }
  if (tensor->dtype != DType::kF32 && tensor->dtype != DType::kBF16 && tensor->dtype != DType::kF16) {
    return absl::InvalidArgumentError(absl::StrCat(checkpoint_.path(*tensor), ": tensor '", stored, "' is ", Describe(*tensor),
                                                   "; weights are f32, bf16 or f16"));
  }
  used_.insert(stored);
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
  for (int64_t group = 0; group < groups; ++group) {
    AddJob({.tensor = *tensor,
            .first_row = group * n + rows.begin,
            .row_count = rows.size(),
            .row_values = k,
            .matrix = matrix->get(),
            .group = group,
            .columns = columns,
            .row_bytes = k * kernels::SizeOf((*tensor)->dtype)});
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
  const int64_t value_bytes = kernels::SizeOf((*tensor)->dtype);
  Staging staging;
  staging.read.resize(range.size() * value_bytes);
  if (absl::Status s = Read(**tensor, range.begin * value_bytes, range.size() * value_bytes, staging.read.data(), staging); !s.ok())
    return s;
  not_finite_.merge(staging.not_finite);
  read_bytes_ += range.size() * value_bytes;
  const void* raw = staging.read.data();
  std::vector<float> values(range.size());
  for (int64_t i = 0; i < range.size(); ++i) values[i] = ValueAt((*tensor)->dtype, raw, i);
  absl::StatusOr<kernels::DeviceBuffer> buffer = backend_->Allocate(range.size() * sizeof(float), name);
  if (!buffer.ok()) return buffer.status();
  backend_->CopyToDevice(buffer->address(), values.data(), range.size() * sizeof(float));
  backend_->Wait(backend_->Record());
  vector.buffer = *std::move(buffer);
  return vector;
}

absl::StatusOr<const TensorInfo*> WeightLoader::ExpectRows(const std::string& name, int64_t rows, int64_t dim) {
  const TensorInfo* tensor = checkpoint_.Find(names_.Stored(name));
  if (tensor == nullptr || (tensor->dtype != DType::kI8 && tensor->dtype != DType::kU8)) return Expect(name, {rows, dim});
  const int64_t columns = kernels::RowBytes(RowFormatOf(tensor->dtype), dim);
  if (tensor->shape != std::vector<int64_t>{rows, columns}) {
    return absl::InvalidArgumentError(absl::StrCat(checkpoint_.path(*tensor), ": tensor '", tensor->name, "' is ",
                                                   Describe(*tensor), "; config.json asks for [", rows, ", ", dim, "], in ",
                                                   kernels::NameOf(RowFormatOf(tensor->dtype)), " [", rows, ", ", columns, "]"));
  }
  used_.insert(tensor->name);
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
      return absl::InvalidArgumentError(absl::StrCat(checkpoint_.path(*scale_tensor), ": tensor '", scale_tensor->name, "' is ",
                                                     Describe(*scale_tensor), "; scales of rows are f32"));
    }
  }
  table_bytes_ += rows * (kernels::RowBytes(types_.table, columns.size()) + (kernels::HasScales(types_.table) ? 4 : 0));
  if (planning()) return std::shared_ptr<kernels::RowStore>();
  absl::StatusOr<std::unique_ptr<kernels::RowStore>> store = backend_->NewRowStore(
      {.rows = rows, .dim = dim, .first_column = columns.begin, .end_column = columns.end, .format = types_.table});
  if (!store.ok()) return store.status();
  AddJob({.tensor = *tensor,
          .row_count = rows,
          .row_values = dim,
          .rows = store->get(),
          .scales = scale_tensor,
          .row_bytes = format == DType::kF16 ? dim * kernels::SizeOf(format) : kernels::RowBytes(format, dim)});
  return std::shared_ptr<kernels::RowStore>(*std::move(store));
}

void WeightLoader::AddJob(Job job) {
  job.chunk_rows = RowsIn(kChunkBytes, job.row_bytes, kernels::WeightMatrix::kStoreRows);
  job.first_chunk = chunks_;
  chunks_ += job.chunks();
  read_bytes_ += job.row_count * (job.row_bytes + (job.scales == nullptr ? 0 : static_cast<int64_t>(sizeof(float))));
  jobs_.push_back(job);
}

absl::Status WeightLoader::Read(const TensorInfo& tensor, int64_t begin, int64_t bytes, void* out, Staging& staging) const {
  if (absl::Status s = checkpoint_.Read(tensor, begin, bytes, out); !s.ok()) return s;
  const int64_t not_finite = CountNotFinite(tensor.dtype, out, bytes / kernels::SizeOf(tensor.dtype));
  if (not_finite > 0) staging.not_finite[tensor.name] += not_finite;
  return absl::OkStatus();
}

absl::Status WeightLoader::RunRows(const Job& job, int64_t first_row, int64_t row_count, Staging& staging) const {
  const DType format = RowFormatOf(job.tensor->dtype);
  const int64_t begin = first_row * job.row_bytes, bytes = row_count * job.row_bytes;
  const int64_t scale_bytes = job.scales == nullptr ? 0 : row_count * static_cast<int64_t>(sizeof(float));
  const bool direct = job.rows->DirectRows() != nullptr && job.rows->spec().format == format;
  if (!direct) staging.read.resize(std::max<size_t>(staging.read.size(), bytes + scale_bytes));
  // Scales first: they stay aligned.
  float* scales =
      direct ? job.rows->DirectScales() + (job.scales == nullptr ? 0 : first_row) : reinterpret_cast<float*>(staging.read.data());
  if (job.scales != nullptr) {
    const int64_t first = first_row * static_cast<int64_t>(sizeof(float));
    if (absl::Status s = Read(*job.scales, first, scale_bytes, scales, staging); !s.ok()) return s;
  }
  void* rows = direct ? static_cast<char*>(job.rows->DirectRows()) + begin : staging.read.data() + scale_bytes;
  if (absl::Status s = Read(*job.tensor, begin, bytes, rows, staging); !s.ok()) return s;
  if (direct) return absl::OkStatus();
  if (format == DType::kF16) {
    job.rows->Store(first_row, row_count, Widen(rows, row_count * job.row_values, staging.widened), DType::kF32);
  } else {
    job.rows->Store(first_row, row_count, rows, format, scales);
  }
  return absl::OkStatus();
}

absl::Status WeightLoader::RunMatrix(const Job& job, int64_t first_row, int64_t row_count, Staging& staging) const {
  const int64_t bytes = row_count * job.row_bytes;
  staging.read.resize(std::max<size_t>(staging.read.size(), bytes));
  const absl::Status status = Read(*job.tensor, (job.first_row + first_row) * job.row_bytes, bytes, staging.read.data(), staging);
  if (!status.ok()) return status;
  DType dtype = job.tensor->dtype;
  const void* rows = staging.read.data();
  if (dtype == DType::kF16) {
    rows = Widen(rows, row_count * job.row_values, staging.widened);
    dtype = DType::kF32;
  }
  job.matrix->Store(job.group, first_row, row_count, static_cast<const char*>(rows) + job.columns.begin * kernels::SizeOf(dtype),
                    dtype, job.row_values);
  return absl::OkStatus();
}

absl::Status WeightLoader::RunChunk(int64_t chunk, Staging& staging) const {
  const auto after =
      std::upper_bound(jobs_.begin(), jobs_.end(), chunk, [](int64_t c, const Job& job) { return c < job.first_chunk; });
  const Job& job = *(after - 1);
  const int64_t begin = (chunk - job.first_chunk) * job.chunk_rows;
  const int64_t end = std::min(begin + job.chunk_rows, job.row_count);
  const int64_t step =
      job.matrix != nullptr ? RowsIn(kPieceBytes, job.row_bytes, kPanelRows) : RowsIn(kPieceBytes, job.row_bytes, 1);
  for (int64_t row = begin; row < end; row += step) {
    const int64_t count = std::min(step, end - row);
    absl::Status status = job.matrix != nullptr ? RunMatrix(job, row, count, staging) : RunRows(job, row, count, staging);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status WeightLoader::Run(int threads) {
  std::atomic<int64_t> next = 0;
  kernels::Mutex mutex;
  absl::Status first_error;
  const auto work = [&] {
    Staging staging;
    absl::Status status;
    for (int64_t chunk = next++; chunk < chunks_ && status.ok(); chunk = next++) status = RunChunk(chunk, staging);
    kernels::MutexLock lock(mutex);
    for (const auto& [name, count] : staging.not_finite) not_finite_[name] += count;
    if (status.ok()) return;
    if (first_error.ok()) first_error = status;
    next = chunks_;
  };
  const int64_t helpers = std::min<int64_t>(threads, chunks_) - 1;
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < helpers; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
  jobs_.clear();
  return first_error;
}

std::vector<std::string> WeightLoader::UnusedTensors() const {
  std::vector<std::string> unused;
  for (const auto& [name, tensor] : checkpoint_.tensors()) {
    // Rotary frequencies, which some checkpoints list, follow from config.json.
    if (!used_.contains(name) && !absl::EndsWith(name, ".rotary_emb.inv_freq")) unused.push_back(name);
  }
  return unused;
}

}  // namespace memserve::engine
