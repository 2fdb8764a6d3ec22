// Device memory for activations, taken once when the model is built. Like WeightLoader it runs twice: without a back end it only counts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace memserve::engine {

class Workspace {
 public:
  explicit Workspace(kernels::Backend* backend) : backend_(backend) {}

  // Space for rows × columns values, or null while planning and after an error (see status()).
  template <typename T = float>
  T* Take(int64_t rows, int64_t columns) {
    return static_cast<T*>(TakeBytes(rows * columns * static_cast<int64_t>(sizeof(T))));
  }

  int64_t bytes() const { return bytes_; }
  const absl::Status& status() const { return status_; }

 private:
  void* TakeBytes(int64_t bytes) {
    bytes_ += bytes;
    if (backend_ == nullptr || !status_.ok() || bytes == 0) return nullptr;
    absl::StatusOr<kernels::DeviceBuffer> buffer = backend_->Allocate(bytes, "activations");
    if (!buffer.ok()) {
      status_ = buffer.status();
      return nullptr;
    }
    buffers_.push_back(*std::move(buffer));
    return buffers_.back().address();
  }

  kernels::Backend* const backend_;
  std::vector<kernels::DeviceBuffer> buffers_;
  int64_t bytes_ = 0;
  absl::Status status_;
};

}  // namespace memserve::engine
