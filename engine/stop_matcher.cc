#include "engine/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace memserve::engine {
namespace {

// Length of the longest end of `text` that begins `stop` without being all of it.
size_t LongestBeginning(std::string_view text, std::string_view stop) {
  for (size_t length = std::min(text.size(), stop.size() - 1); length > 0; --length) {
    if (text.ends_with(stop.substr(0, length))) return length;
  }
  return 0;
}

}  // namespace

std::string StopMatcher::Append(std::string_view text) {
  if (stops_.empty()) return std::string(text);
  if (matched_) return "";
  held_.append(text);
  size_t first = std::string::npos;
  size_t hold = 0;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at != std::string::npos && (at < first || (at == first && stop.size() > matched_->size()))) {
      first = at;
      matched_ = stop;
    }
    hold = std::max(hold, LongestBeginning(held_, stop));
  }
  const size_t shown = matched_ ? first + (include_ ? matched_->size() : 0) : held_.size() - hold;
  std::string out = held_.substr(0, shown);
  held_.erase(0, shown);
  return out;
}

std::string StopMatcher::Finish() {
  if (matched_) return "";
  return std::exchange(held_, "");
}

}  // namespace memserve::engine
