#include "server/converted_checkpoint.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "spdlog/spdlog.h"

namespace memserve::server {
namespace {

namespace fs = std::filesystem;

constexpr char kConverter[] = "memserve-convert";
constexpr int kNotFound = 127;  // the exit status of a child that found no program
constexpr int kMostFiles = 100'000;

bool Exists(const fs::path& path) {
  std::error_code error;
  return fs::exists(path, error);
}

bool HasFile(const fs::path& folder, absl::string_view ending) {
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    if (absl::EndsWith(at->path().filename().string(), ending)) return true;
  }
  return false;
}

// What kind of checkpoint it is that must be converted; empty: none, or not known.
std::string KindOf(const fs::path& path) {
  std::error_code error;
  if (fs::is_regular_file(path, error)) {
    if (absl::EndsWith(path.string(), ".gguf")) return "a GGUF file";
    if (absl::EndsWith(path.string(), ".pth") || absl::EndsWith(path.string(), ".pt")) return "a PyTorch file";
    return "";
  }
  if (Exists(path / "config.json") && HasFile(path, ".safetensors")) return "";
  if (Exists(path / "params.json") || Exists(path / "consolidated" / "params.json")) {
    return "a checkpoint of the original memory-layer implementation";
  }
  if (Exists(path / ".metadata")) return "a distributed PyTorch checkpoint";
  if (HasFile(path, ".gguf")) return "a folder with a GGUF file";
  if (Exists(path / "rest.pt")) return "a sparse-memory checkpoint";
  if (HasFile(path, ".bin") || HasFile(path, ".pt") || HasFile(path, ".pth")) return "a folder of PyTorch files";
  return "";
}

// FNV-1a, over what says whether a conversion is still that of its source.
class Fingerprint {
 public:
  void Add(absl::string_view text) {
    for (const char c : text) hash_ = (hash_ ^ static_cast<uint8_t>(c)) * 1099511628211u;
    hash_ = (hash_ ^ 0xffu) * 1099511628211u;
  }
  void AddFile(const fs::path& path) {
    std::error_code error;
    Add(absl::StrCat(path.string(), " ", fs::file_size(path, error), " ", fs::last_write_time(path, error).time_since_epoch().count()));
  }
  std::string Hex() const { return absl::StrFormat("%016x", hash_); }

 private:
  uint64_t hash_ = 14695981039346656037u;
};

absl::StatusOr<std::string> FingerprintOf(const fs::path& source) {
  Fingerprint fingerprint;
  std::error_code error;
  if (fs::is_regular_file(source, error)) {
    fingerprint.AddFile(source);
    return fingerprint.Hex();
  }
  std::vector<fs::path> files;
  for (fs::recursive_directory_iterator at(source, error), end; !error && at != end; at.increment(error)) {
    if (!at->is_regular_file(error)) continue;
    files.push_back(at->path());
    if (files.size() > kMostFiles) {
      return absl::InvalidArgumentError(absl::StrCat("--checkpoint: ", source.string(), " has more than ", kMostFiles, " files"));
    }
  }
  if (error) return absl::PermissionDeniedError(absl::StrCat("--checkpoint: cannot list ", source.string(), ": ", error.message()));
  std::sort(files.begin(), files.end());
  for (const fs::path& file : files) fingerprint.AddFile(file);
  return fingerprint.Hex();
}

// Held until it goes out of scope, also against other processes.
class FileLock {
 public:
  explicit FileLock(const std::string& path) : descriptor_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    while (descriptor_ >= 0 && flock(descriptor_, LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  ~FileLock() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;
  bool held() const { return descriptor_ >= 0; }

 private:
  const int descriptor_;
};

// Runs the converter, whose output goes to our standard error; it ends with this process. Gives its exit status, or 128 + signal.
int RunConverter(const std::string& source, const std::string& target) {
  const char* const arguments[] = {kConverter, source.c_str(), target.c_str(), nullptr};
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child < 0) return kNotFound;
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1);
    dup2(STDERR_FILENO, STDOUT_FILENO);
    execvp(kConverter, const_cast<char* const*>(arguments));
    _exit(kNotFound);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

absl::StatusOr<std::string> ConvertedCheckpoint(const std::string& checkpoint, const std::string& cache) {
  const std::string kind = KindOf(checkpoint);
  if (kind.empty()) return checkpoint;
  const std::string what = absl::StrCat("--checkpoint: ", checkpoint, " is ", kind, ", which must be converted");
  if (cache.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(what, ": say --convert_cache=DIR, or run ", kConverter, " ", checkpoint, " DIR"));
  }
  std::error_code error;
  const fs::path source = fs::canonical(checkpoint, error);
  if (error) return absl::NotFoundError(absl::StrCat("--checkpoint: ", checkpoint, ": ", error.message()));
  fs::create_directories(cache, error);
  absl::StatusOr<std::string> fingerprint = FingerprintOf(source);
  if (!fingerprint.ok()) return fingerprint.status();
  const std::string target = absl::StrCat(cache, "/", source.stem().string(), "-", *fingerprint);
  const FileLock lock(target + ".lock");
  if (!lock.held()) return absl::PermissionDeniedError(absl::StrCat("--convert_cache: cannot write to ", cache, ": ", strerror(errno)));
  const std::string done = target + ".done";
  if (Exists(done) && Exists(target + "/config.json")) {
    spdlog::info("{}: converted before, in {}", checkpoint, target);
    return target;
  }
  spdlog::info("{} is {}: converting to {}", checkpoint, kind, target);
  const int status = RunConverter(source.string(), target);
  if (status == kNotFound) {
    return absl::FailedPreconditionError(
        absl::StrCat(what, "; the converter ", kConverter, " is not installed: pip install clients/python (of the memserve sources)"));
  }
  if (status != 0) return absl::InternalError(absl::StrCat(what, "; ", kConverter, " ended with status ", status, " (see above)"));
  std::ofstream(done) << checkpoint << "\n";
  return target;
}

}  // namespace memserve::server
