// How tokenizer.json splits a normalised text into pieces that are encoded each for itself: the steps under "pre_tokenizer".
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/tokenizer/regex.h"
#include "nlohmann/json.hpp"

namespace memserve::engine {

inline constexpr char kMetaspace[] = "\xe2\x96\x81";  // U+2581, which stands for a space

class PreTokenizer {
 public:
  // `description` may be null: the text stays one piece. UNIMPLEMENTED names a kind that is not known.
  static absl::StatusOr<PreTokenizer> Parse(const nlohmann::json& description);

  // Pieces are bytes, encoded one symbol a byte; else one symbol a character.
  bool byte_level() const { return byte_level_; }

  // `starts_text`: nothing of the whole text stands before `text`. Pieces point into `text` or into `written`.
  absl::Status Split(std::string_view text, bool starts_text, std::deque<std::string>& written,
                     std::vector<std::string_view>& pieces) const;

 private:
  enum class Kind { kSplit, kPrefixSpace, kMetaspace };
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kAlways, kFirst, kNever };
  struct Step {
    Kind kind = Kind::kSplit;
    std::shared_ptr<const Regex> pattern;
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;
    Prepend prepend = Prepend::kAlways;  // of kMetaspace
  };

  absl::Status Add(const nlohmann::json& description, int depth);
  absl::Status AddSplit(const std::string& pattern, Behavior behavior, bool invert);
  static absl::Status SplitPiece(const Step& step, std::string_view piece, std::vector<std::string_view>& pieces);

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace memserve::engine
