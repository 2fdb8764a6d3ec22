#include "engine/model/checkpoint.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <set>
#include <sys/stat.h>
#include <unistd.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/model/json.h"

namespace memserve::engine {
namespace {

using nlohmann::json;

constexpr int64_t kMaxHeaderBytes = 100 << 20;
constexpr int64_t kMaxIndexBytes = 100 << 20;
constexpr size_t kMaxFiles = 4096;
constexpr size_t kMaxRank = 8;

absl::Status Bad(const std::string& path, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", message));
}

std::string Quoted(const std::string& name) { return absl::StrCat("'", name.substr(0, 200), "'"); }

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

absl::Status ReadExactly(int descriptor, const std::string& path, int64_t offset, int64_t bytes, void* out) {
  char* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = pread(descriptor, to, static_cast<size_t>(std::min<int64_t>(bytes, 1 << 30)), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return absl::DataLossError(absl::StrCat(path, ": read error at byte ", offset, ": ", std::strerror(errno)));
    if (got == 0) {
      return absl::DataLossError(absl::StrCat(path, ": ends at byte ", offset, "; ", bytes, " more were expected (did the file change?)"));
    }
    to += got;
    offset += got;
    bytes -= got;
  }
  return absl::OkStatus();
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
    return Bad(path, absl::StrCat(where, " is ", entry["dtype"].get<std::string>().substr(0, 40), "; known are F32, BF16, F16, I8, U8, I32, I64"));
  }
  if (entry["shape"].size() > kMaxRank) return Bad(path, absl::StrCat(where, " has more than ", kMaxRank, " dimensions"));
  int64_t expected = kernels::SizeOf(tensor->dtype);
  for (const json& extent : entry["shape"]) {
    if (!extent.is_number_unsigned() || extent.get<uint64_t>() > (uint64_t{1} << 48)) {
      return Bad(path, absl::StrCat(where, " has the shape ", entry["shape"].dump().substr(0, 100)));
    }
    tensor->shape.push_back(extent.get<int64_t>());
    if (__builtin_mul_overflow(expected, tensor->shape.back(), &expected)) {
      return Bad(path, absl::StrCat(where, " has the shape ", entry["shape"].dump().substr(0, 100), ": too large"));
    }
  }
  const json& begin = entry["data_offsets"][0];
  const json& end = entry["data_offsets"][1];
  if (!begin.is_number_unsigned() || !end.is_number_unsigned() || begin > end || end > static_cast<uint64_t>(data_bytes)) {
    return Bad(path, absl::StrCat(where, " lies at bytes ", entry["data_offsets"].dump().substr(0, 100), " of the data; the file has ",
                                  data_bytes));
  }
  tensor->offset = begin.get<int64_t>();
  tensor->bytes = end.get<int64_t>() - tensor->offset;
  if (tensor->bytes != expected) {
    return Bad(path, absl::StrCat(where, " has ", tensor->bytes, " bytes; ", Describe(*tensor), " needs ", expected));
  }
  return absl::OkStatus();
}

absl::Status CheckNoOverlap(const std::string& path, std::vector<TensorInfo> tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) { return a.offset < b.offset; });
  const TensorInfo* last = nullptr;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.bytes == 0) continue;
    if (last != nullptr && tensor.offset < last->offset + last->bytes) {
      return Bad(path, absl::StrCat("tensors ", Quoted(last->name), " and ", Quoted(tensor.name), " overlap"));
    }
    last = &tensor;
  }
  return absl::OkStatus();
}

// File names of the index, each inside the folder.
absl::StatusOr<std::set<std::string>> FilesOfIndex(const std::string& path) {
  absl::StatusOr<std::string> text = ReadFile(path, kMaxIndexBytes);
  if (!text.ok()) return text.status();
  absl::StatusOr<json> index = ParseJsonObject(*text, path);
  if (!index.ok()) return index.status();
  if (!index->contains("weight_map") || !(*index)["weight_map"].is_object()) return Bad(path, "has no weight_map");
  std::set<std::string> names;
  for (const auto& [tensor, file] : (*index)["weight_map"].items()) {
    if (!file.is_string()) return Bad(path, absl::StrCat("weight_map gives no file for ", Quoted(tensor)));
    const std::string name = file.get<std::string>();
    if (name.empty() || name.find('/') != std::string::npos || name[0] == '.') {
      return Bad(path, absl::StrCat("weight_map names the file ", Quoted(name), "; only files of the folder itself are read"));
    }
    names.insert(name);
  }
  return names;
}

absl::StatusOr<std::set<std::string>> SafetensorsOfFolder(const std::string& folder) {
  DIR* dir = opendir(folder.c_str());
  if (dir == nullptr) return absl::NotFoundError(absl::StrCat(folder, ": ", std::strerror(errno)));
  std::set<std::string> names;
  while (const dirent* entry = readdir(dir)) {
    if (absl::EndsWith(entry->d_name, ".safetensors") && entry->d_name[0] != '.') names.insert(entry->d_name);
  }
  closedir(dir);
  return names;
}

}  // namespace

std::string Describe(const TensorInfo& tensor) {
  return absl::StrCat(kernels::NameOf(tensor.dtype), " [", absl::StrJoin(tensor.shape, ", "), "]");
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& folder) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->folder_ = folder;
  const std::string index = absl::StrCat(folder, "/model.safetensors.index.json");
  absl::StatusOr<std::set<std::string>> names =
      access(index.c_str(), F_OK) == 0 ? FilesOfIndex(index) : SafetensorsOfFolder(folder);
  if (!names.ok()) return names.status();
  if (names->empty()) return absl::NotFoundError(absl::StrCat(folder, ": has no *.safetensors file"));
  if (names->size() > kMaxFiles) return Bad(folder, absl::StrCat("has ", names->size(), " shards; at most ", kMaxFiles, " are read"));
  for (const std::string& name : *names) {
    if (absl::Status status = checkpoint->AddFile(absl::StrCat(folder, "/", name)); !status.ok()) return status;
  }
  return checkpoint;
}

absl::Status Checkpoint::AddFile(const std::string& path) {
  File file;
  file.path = path;
  file.descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file.descriptor < 0) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  files_.push_back(file);
  struct stat info;
  if (fstat(file.descriptor, &info) != 0 || !S_ISREG(info.st_mode)) return Bad(path, "is not a regular file");
  files_.back().bytes = info.st_size;

  uint64_t header_bytes = 0;
  if (info.st_size < 8) return Bad(path, absl::StrCat("has ", info.st_size, " bytes: no safetensors file"));
  if (absl::Status s = ReadExactly(file.descriptor, path, 0, 8, &header_bytes); !s.ok()) return s;
  if (header_bytes > static_cast<uint64_t>(std::min<int64_t>(info.st_size - 8, kMaxHeaderBytes))) {
    return Bad(path, absl::StrCat("says that its header has ", header_bytes, " bytes; the file has ", info.st_size, ", and at most ",
                                  kMaxHeaderBytes, " are read"));
  }
  std::string text(header_bytes, '\0');
  if (absl::Status s = ReadExactly(file.descriptor, path, 8, static_cast<int64_t>(header_bytes), text.data()); !s.ok()) return s;
  absl::StatusOr<json> header = ParseJsonObject(text, path);
  if (!header.ok()) return header.status();

  const int64_t data_begin = 8 + static_cast<int64_t>(header_bytes);
  std::vector<TensorInfo> found;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") continue;
    TensorInfo tensor;
    if (absl::Status s = ParseTensor(path, name, entry, info.st_size - data_begin, &tensor); !s.ok()) return s;
    tensor.offset += data_begin;
    tensor.file = static_cast<int>(files_.size()) - 1;
    found.push_back(std::move(tensor));
  }
  if (absl::Status s = CheckNoOverlap(path, found); !s.ok()) return s;
  for (TensorInfo& tensor : found) {
    const auto [it, inserted] = tensors_.emplace(tensor.name, tensor);
    if (!inserted) return Bad(path, absl::StrCat("tensor ", Quoted(tensor.name), " is also in ", files_[it->second.file].path));
  }
  return absl::OkStatus();
}

Checkpoint::~Checkpoint() {
  for (const File& file : files_) close(file.descriptor);
}

const TensorInfo* Checkpoint::Find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

absl::Status Checkpoint::Read(const TensorInfo& tensor, int64_t begin, int64_t bytes, void* out) const {
  MEMSERVE_CHECK(begin >= 0 && bytes >= 0 && begin + bytes <= tensor.bytes);
  const File& file = files_[tensor.file];
  absl::Status status = ReadExactly(file.descriptor, file.path, tensor.offset + begin, bytes, out);
  if (!status.ok()) return absl::Status(status.code(), absl::StrCat(status.message(), ", in tensor ", Quoted(tensor.name)));
  return status;
}

}  // namespace memserve::engine
