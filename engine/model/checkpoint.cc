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
#include "engine/model/folder.h"
#include "engine/model/json.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {
namespace {

constexpr int64_t kMaxHeaderBytes = 100 << 20;
constexpr int64_t kMaxIndexBytes = 100 << 20;
constexpr size_t kMaxFiles = 4096;

absl::Status Bad(const std::string& path, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", message));
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

FileState StateOf(const struct stat& info) {
  return {.bytes = info.st_size, .device = static_cast<int64_t>(info.st_dev), .inode = static_cast<int64_t>(info.st_ino),
          .modified_ns = info.st_mtim.tv_sec * int64_t{1000000000} + info.st_mtim.tv_nsec};
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& folder) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->folder_ = folder;
  const std::string index = absl::StrCat(folder, "/model.safetensors.index.json");
  std::map<std::string, std::string> file_of_tensor;
  std::set<std::string> names;
  if (access(index.c_str(), F_OK) == 0) {
    if (absl::Status s = CheckLink(index); !s.ok()) return s;
    LOAD_OR_RETURN(const std::string text, ReadFile(index, kMaxIndexBytes));
    LOAD_OR_RETURN(file_of_tensor, ParseSafetensorsIndex(text, index));
    for (const auto& [tensor, file] : file_of_tensor) names.insert(file);
  } else {
    LOAD_OR_RETURN(names, SafetensorsOfFolder(folder));
  }
  if (names.empty()) return absl::NotFoundError(absl::StrCat(folder, ": has no *.safetensors file"));
  if (names.size() > kMaxFiles) return Bad(folder, absl::StrCat("has ", names.size(), " shards; at most ", kMaxFiles, " are read"));
  for (const std::string& name : names) {
    if (absl::Status status = checkpoint->AddFile(absl::StrCat(folder, "/", name)); !status.ok()) return status;
  }
  for (const auto& [tensor, file] : file_of_tensor) {
    const TensorInfo* found = checkpoint->Find(tensor);
    if (found != nullptr && checkpoint->path(*found) == absl::StrCat(folder, "/", file)) continue;
    return Bad(index, absl::StrCat("says that tensor ", Quoted(tensor), " is in ", file, "; it is ",
                                   found == nullptr ? "in no file" : absl::StrCat("in ", checkpoint->path(*found))));
  }
  return checkpoint;
}

absl::Status Checkpoint::AddFile(const std::string& path) {
  if (absl::Status s = CheckLink(path); !s.ok()) return s;
  File file;
  file.path = path;
  file.descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe would hang
  if (file.descriptor < 0) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  files_.push_back(file);
  struct stat info;
  if (fstat(file.descriptor, &info) != 0 || !S_ISREG(info.st_mode)) return Bad(path, "is not a regular file");
  files_.back().state = StateOf(info);

  uint64_t header_bytes = 0;
  if (info.st_size < 8) return Bad(path, absl::StrCat("has ", info.st_size, " bytes: no safetensors file"));
  if (absl::Status s = ReadExactly(file.descriptor, path, 0, 8, &header_bytes); !s.ok()) return s;
  if (header_bytes > static_cast<uint64_t>(std::min<int64_t>(info.st_size - 8, kMaxHeaderBytes))) {
    return Bad(path, absl::StrCat("says that its header has ", header_bytes, " bytes; the file has ", info.st_size, ", and at most ",
                                  kMaxHeaderBytes, " are read"));
  }
  std::string text(header_bytes, '\0');
  if (absl::Status s = ReadExactly(file.descriptor, path, 8, static_cast<int64_t>(header_bytes), text.data()); !s.ok()) return s;
  const int64_t data_begin = 8 + static_cast<int64_t>(header_bytes);
  LOAD_OR_RETURN(std::vector<TensorInfo> found, ParseSafetensorsHeader(text, path, info.st_size - data_begin));
  for (TensorInfo& tensor : found) {
    tensor.offset += data_begin;
    tensor.file = static_cast<int>(files_.size()) - 1;
    const auto [it, inserted] = tensors_.emplace(tensor.name, tensor);
    if (!inserted) return Bad(path, absl::StrCat("tensor ", Quoted(tensor.name), " is also in ", this->path(it->second)));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::CheckUnchanged() const {
  for (const File& file : files_) {
    struct stat opened, named;
    const bool known = fstat(file.descriptor, &opened) == 0 && stat(file.path.c_str(), &named) == 0;
    if (known && StateOf(opened) == file.state && StateOf(named) == file.state) continue;
    return absl::DataLossError(absl::StrCat(file.path, ": changed while it was loaded: it had ", file.state.bytes, " bytes, ",
                                            known ? absl::StrCat("now it has ", named.st_size) : "now it is gone",
                                            "; start again when it is complete"));
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
