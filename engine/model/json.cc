#include "engine/model/json.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <sys/stat.h>
#include <vector>

#include "absl/strings/str_cat.h"

namespace memserve::engine {
namespace {

constexpr int kMaxDepth = 32;

// Builds the document, refusing duplicate keys and deep nesting while it reads.
class StrictCallback {
 public:
  bool operator()(int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (depth > kMaxDepth) error = absl::StrCat("is nested more than ", kMaxDepth, " levels deep");
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end && !keys.empty()) keys.pop_back();
    if (event == Event::key && !keys.empty() && !keys.back().insert(parsed.get<std::string>()).second) {
      error = absl::StrCat("has the key '", parsed.get<std::string>().substr(0, 200), "' twice");
    }
    return error.empty();  // false: the value is dropped at once
  }
  std::vector<std::set<std::string>> keys;
  std::string error;
};

}  // namespace

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, ": is not a regular file"));
  if (info.st_size > max_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": has ", info.st_size, " bytes; at most ", max_bytes, " are read"));
  }
  std::ifstream file(path, std::ios::binary);
  std::stringstream content;
  content << file.rdbuf();
  if (!file) return absl::DataLossError(absl::StrCat(path, ": cannot be read: ", std::strerror(errno)));
  return std::move(content).str();
}

absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& text, const std::string& where) {
  StrictCallback callback;
  nlohmann::json document;
  try {
    document = nlohmann::json::parse(text, std::ref(callback));
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": is not JSON: ", std::string(e.what()).substr(0, 300)));
  }
  if (!callback.error.empty()) return absl::InvalidArgumentError(absl::StrCat(where, ": ", callback.error));
  if (!document.is_object()) return absl::InvalidArgumentError(absl::StrCat(where, ": is not a JSON object"));
  return document;
}

}  // namespace memserve::engine
