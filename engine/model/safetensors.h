// The headers of safetensors files and the index of a sharded checkpoint: JSON from outside, checked against the bytes there are.
// Source: the safetensors format (u64 header length, JSON header, data without gaps), Hugging Face's model.safetensors.index.json.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

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

// A tensor's name in quotes, on one line whatever it holds.
std::string Quoted(const std::string& name);

// Tensors of the header `text`; offsets count from the data's begin, and `file` is 0. The data must be covered without gap and overlap.
absl::StatusOr<std::vector<TensorInfo>> ParseSafetensorsHeader(const std::string& text, const std::string& where, int64_t data_bytes);

// From tensor names to names of files, each directly in the folder.
absl::StatusOr<std::map<std::string, std::string>> ParseSafetensorsIndex(const std::string& text, const std::string& where);

}  // namespace memserve::engine
