// What tokenizer.json does to a text before it is split: the steps under "normalizer".
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/tokenizer/regex.h"
#include "nlohmann/json.hpp"

namespace memserve::engine {

class Normalizer {
 public:
  // `description` may be null: nothing is done. UNIMPLEMENTED names a kind that is not known.
  static absl::StatusOr<Normalizer> Parse(const nlohmann::json& description);

  bool empty() const { return steps_.empty(); }
  // `text` is valid UTF-8, and so is what comes out.
  absl::StatusOr<std::string> Apply(std::string text) const;

 private:
  enum class Kind { kNfc, kNfd, kNfkc, kNfkd, kPrepend, kReplace, kReplacePattern, kStrip, kLowercase };
  struct Step {
    Kind kind;
    std::string from;  // of kReplace
    std::string to;    // of kReplace, kReplacePattern, kPrepend
    std::shared_ptr<const Regex> pattern;
    bool left = false;  // of kStrip
    bool right = false;
  };
  absl::Status Add(const nlohmann::json& description, int depth);

  std::vector<Step> steps_;
};

}  // namespace memserve::engine
