#include "engine/model/folder.h"

#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace memserve::engine {
namespace {

bool IsHubBlob(absl::string_view target) {
  return absl::ConsumePrefix(&target, "../../blobs/") && target.size() >= 40 && target.size() <= 64 &&
         std::all_of(target.begin(), target.end(), [](unsigned char c) { return absl::ascii_isxdigit(c); });
}

std::string RealPath(const std::string& path) {
  char resolved[PATH_MAX];
  return realpath(path.c_str(), resolved) == nullptr ? "" : resolved;
}

}  // namespace

absl::Status CheckLink(const std::string& path) {
  char text[PATH_MAX];
  const ssize_t length = readlink(path.c_str(), text, sizeof(text));
  if (length < 0) return absl::OkStatus();
  const std::string target(text, length);
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const std::string from = RealPath(folder), to = RealPath(path);
  if (from.empty() || to.empty()) return absl::NotFoundError(absl::StrCat(path, ": the link leads nowhere"));
  if (absl::StartsWith(to, from == "/" ? from : absl::StrCat(from, "/"))) return absl::OkStatus();
  // The blob itself must not be a link onwards.
  char onwards[2];
  if (IsHubBlob(target) && readlink(absl::StrCat(folder, "/", target).c_str(), onwards, sizeof(onwards)) < 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(path, ": is a link to '", absl::Utf8SafeCHexEscape(target.substr(0, 200)),
                                                 "', out of the folder; only ../../blobs/HASH, as in the hub's cache, is followed"));
}

}  // namespace memserve::engine
