// The tensors of a checkpoint folder: safetensors files whose headers were checked against the files. Nothing is mapped: tensors
// are read with pread straight to where they are wanted, so a file that shrinks meanwhile gives an error, not a signal.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/safetensors.h"

namespace memserve::engine {

// What tells one state of a file from another.
struct FileState {
  int64_t bytes = 0, device = 0, inode = 0, modified_ns = 0;
  bool operator==(const FileState&) const = default;
};

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

  // DATA_LOSS if a file is not what it was when it was opened. To be asked after the last Read.
  absl::Status CheckUnchanged() const;

 private:
  struct File {
    std::string path;
    int descriptor = -1;
    FileState state;  // when it was opened
  };

  Checkpoint() = default;
  absl::Status AddFile(const std::string& path);

  std::string folder_;
  std::vector<File> files_;
  std::map<std::string, TensorInfo> tensors_;
};

}  // namespace memserve::engine
