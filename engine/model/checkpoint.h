// The tensors of a checkpoint folder: safetensors files whose headers were checked against the files. Nothing is mapped: tensors
// are read with pread straight to where they are wanted, so a file that shrinks meanwhile gives an error, not a signal.
// Source: the safetensors format (u64 header length, JSON header, data).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace memserve::engine {

struct TensorInfo {
  std::string name;
  kernels::DType dtype = kernels::DType::kF32;
  std::vector<int64_t> shape;
  int file = 0;        // index of the file
  int64_t offset = 0;  // of its first byte in the file
  int64_t bytes = 0;
};

// "f32 [256, 64]", for messages.
std::string Describe(const TensorInfo& tensor);

// Constant after Open; reads may come from several threads.
class Checkpoint {
 public:
  // The files that model.safetensors.index.json names, or all *.safetensors of the folder. NOT_FOUND: nothing there.
  // INVALID_ARGUMENT, DATA_LOSS: one line with file, tensor, expected and found.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& folder);
  ~Checkpoint();

  const std::string& folder() const { return folder_; }
  const std::string& path(const TensorInfo& tensor) const { return files_[tensor.file].path; }
  const TensorInfo* Find(const std::string& name) const;
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }

  // Copies bytes [begin, begin + bytes) of the tensor to `out`. DATA_LOSS when the file has fewer.
  absl::Status Read(const TensorInfo& tensor, int64_t begin, int64_t bytes, void* out) const;

 private:
  struct File {
    std::string path;
    int descriptor = -1;
    int64_t bytes = 0;
  };

  Checkpoint() = default;
  absl::Status AddFile(const std::string& path);

  std::string folder_;
  std::vector<File> files_;
  std::map<std::string, TensorInfo> tensors_;
};

}  // namespace memserve::engine
