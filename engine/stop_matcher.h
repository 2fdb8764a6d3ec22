// Finds stop strings in text that arrives in pieces, across their borders.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace memserve::engine {

class StopMatcher {
 public:
  // None of `stops` is empty. `include`: what matches is shown too.
  explicit StopMatcher(std::vector<std::string> stops, bool include = false) : stops_(std::move(stops)), include_(include) {}

  // The text that may be shown now. If a stop string is complete, what stands before its first occurrence, and matched() is set;
  // of several that begin at the same place the longest. What may become a stop string is held back.
  std::string Append(std::string_view text);
  // What was held back.
  std::string Finish();

  const std::optional<std::string>& matched() const { return matched_; }

 private:
  const std::vector<std::string> stops_;
  const bool include_;
  std::string held_;
  std::optional<std::string> matched_;
};

}  // namespace memserve::engine
