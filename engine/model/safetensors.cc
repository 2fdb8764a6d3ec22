#include "engine/model/safetensors.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/model/json.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {
namespace {

using nlohmann::json;

constexpr size_t kMaxRank = 8;

absl::Status Bad(const std::string& path, absl::string_view message) { return absl::InvalidArgumentError(absl::StrCat(path, ": ", message)); }

// False for element types that no weight has.
bool ParseDType(const std::string& text, kernels::DType* dtype) {
  static const std::map<std::string, kernels::DType> kKnown = {{"F32", kernels::DType::kF32},
                                                               {"BF16", kernels::DType::kBF16},
                                                               {"I8", kernels::DType::kI8},
                                                               {"U8", kernels::DType::kU8},
                                                               {"F16", kernels::DType::kF16},
                                                               {"I32", kernels::DType::kI32},
                                                               {"I64", kernels::DType::kI64}};
  const auto it = kKnown.find(text);
  if (it == kKnown.end()) return false;
  *dtype = it->second;
  return true;
}

// Reads {"dtype", "shape", "data_offsets"} of one tensor. Offsets are relative to the data's begin.
absl::Status ParseTensor(const std::string& path, const std::string& name, const json& entry, int64_t data_bytes, TensorInfo* tensor) {
  const std::string where = absl::StrCat("tensor ", Quoted(name));
  if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() || !entry.contains("shape") ||
      !entry["shape"].is_array() || !entry.contains("data_offsets") || !entry["data_offsets"].is_array() ||
      entry["data_offsets"].size() != 2) {
    return Bad(path, absl::StrCat(where, " has no dtype, shape and data_offsets"));
  }
  tensor->name = name;
  if (!ParseDType(entry["dtype"].get<std::string>(), &tensor->dtype)) {
    return Bad(path, absl::StrCat(where, " is ", absl::Utf8SafeCHexEscape(entry["dtype"].get<std::string>().substr(0, 40)), "; known are F32, BF16, F16, I8, U8, I32, I64"));
  }
  if (entry["shape"].size() > kMaxRank) return Bad(path, absl::StrCat(where, " has more than ", kMaxRank, " dimensions"));
  int64_t expected = kernels::SizeOf(tensor->dtype);
  for (const json& extent : entry["shape"]) {
    if (!extent.is_number_unsigned() || extent.get<uint64_t>() > (uint64_t{1} << 48)) {
      return Bad(path, absl::StrCat(where, " has the shape ", entry["shape"].dump(-1, ' ', true).substr(0, 100)));
    }
    tensor->shape.push_back(extent.get<int64_t>());
    if (__builtin_mul_overflow(expected, tensor->shape.back(), &expected)) {
      return Bad(path, absl::StrCat(where, " has the shape ", entry["shape"].dump(-1, ' ', true).substr(0, 100), ": too large"));
    }
  }
  const json& begin = entry["data_offsets"][0];
  const json& end = entry["data_offsets"][1];
  if (!begin.is_number_unsigned() || !end.is_number_unsigned() || begin > end || end > static_cast<uint64_t>(data_bytes)) {
    return Bad(path, absl::StrCat(where, " lies at bytes ", entry["data_offsets"].dump(-1, ' ', true).substr(0, 100), " of the data; the file has ",
                                  data_bytes));
  }
  tensor->offset = begin.get<int64_t>();
  tensor->bytes = end.get<int64_t>() - tensor->offset;
  if (tensor->bytes != expected) {
    return Bad(path, absl::StrCat(where, " has ", tensor->bytes, " bytes; ", Describe(*tensor), " needs ", expected));
  }
  return absl::OkStatus();
}

// As the format wants it: every byte of the data belongs to one tensor.
absl::Status CheckCover(const std::string& path, std::vector<TensorInfo> tensors, int64_t data_bytes) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) { return a.offset < b.offset; });
  const TensorInfo* last = nullptr;
  int64_t end = 0;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.bytes == 0) continue;
    if (tensor.offset < end) return Bad(path, absl::StrCat("tensors ", Quoted(last->name), " and ", Quoted(tensor.name), " overlap"));
    if (tensor.offset > end) {
      return Bad(path, absl::StrCat("bytes ", end, " to ", tensor.offset, " of the data, before ", Quoted(tensor.name), ", belong to no tensor"));
    }
    last = &tensor;
    end = tensor.offset + tensor.bytes;
  }
  if (end == data_bytes) return absl::OkStatus();
  return Bad(path, absl::StrCat("has ", data_bytes, " bytes of data; its tensors take ", end, last == nullptr ? "" : absl::StrCat(", up to ", Quoted(last->name))));
}

}  // namespace

std::string Describe(const TensorInfo& tensor) {
  return absl::StrCat(kernels::NameOf(tensor.dtype), " [", absl::StrJoin(tensor.shape, ", "), "]");
}

std::string Quoted(const std::string& name) { return absl::StrCat("'", absl::Utf8SafeCHexEscape(name.substr(0, 200)), "'"); }

absl::StatusOr<std::vector<TensorInfo>> ParseSafetensorsHeader(const std::string& text, const std::string& where, int64_t data_bytes) {
  LOAD_OR_RETURN(const json header, ParseJsonObject(text, where));
  std::vector<TensorInfo> tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    TensorInfo tensor;
    if (absl::Status s = ParseTensor(where, name, entry, data_bytes, &tensor); !s.ok()) return s;
    tensors.push_back(std::move(tensor));
  }
  if (absl::Status s = CheckCover(where, tensors, data_bytes); !s.ok()) return s;
  return tensors;
}

absl::StatusOr<std::map<std::string, std::string>> ParseSafetensorsIndex(const std::string& text, const std::string& where) {
  LOAD_OR_RETURN(const json index, ParseJsonObject(text, where));
  if (!index.contains("weight_map") || !index["weight_map"].is_object()) return Bad(where, "has no weight_map");
  std::map<std::string, std::string> files;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    if (!file.is_string()) return Bad(where, absl::StrCat("weight_map gives no file for ", Quoted(tensor)));
    const std::string name = file.get<std::string>();
    if (name.empty() || name[0] == '.' || name.find('/') != std::string::npos || name.find('\0') != std::string::npos) {
      return Bad(where, absl::StrCat("weight_map names the file ", Quoted(name), " for ", Quoted(tensor), "; only files of the folder itself are read"));
    }
    files.emplace(tensor, name);
  }
  if (files.empty()) return Bad(where, "weight_map is empty");
  return files;
}

}  // namespace memserve::engine
