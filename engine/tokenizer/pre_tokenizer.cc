#include "engine/tokenizer/pre_tokenizer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/tokenizer/tokenizer_json.h"

namespace memserve::engine {
namespace {

constexpr size_t kMaxSteps = 64;
constexpr char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct Part {
  std::string_view text;
  bool matches;
};

}  // namespace

absl::StatusOr<PreTokenizer> PreTokenizer::Parse(const nlohmann::json& description) {
  PreTokenizer pre_tokenizer;
  if (absl::Status s = pre_tokenizer.Add(description, 0); !s.ok()) return s;
  return pre_tokenizer;
}

absl::Status PreTokenizer::AddSplit(const std::string& pattern, Behavior behavior, bool invert) {
  absl::StatusOr<std::unique_ptr<Regex>> regex = Regex::Compile(pattern);
  if (!regex.ok()) return absl::InvalidArgumentError(absl::StrCat("pre_tokenizer: ", regex.status().message()));
  steps_.push_back({.pattern = *std::move(regex), .behavior = behavior, .invert = invert});
  return absl::OkStatus();
}

absl::Status PreTokenizer::Add(const nlohmann::json& description, int depth) {
  if (description.is_null()) return absl::OkStatus();
  if (steps_.size() >= kMaxSteps || depth > 4) return absl::InvalidArgumentError("pre_tokenizer: has too many steps");
  JsonFields fields(description, "pre_tokenizer");
  const std::string type = fields.String("type");
  if (!fields.status().ok()) return fields.status();
  if (byte_level_) return absl::UnimplementedError("pre_tokenizer: has a step after ByteLevel; ByteLevel must be the last");
  if (type == "Sequence") {
    for (const nlohmann::json& part : fields.Array("pretokenizers")) {
      if (absl::Status s = Add(part, depth + 1); !s.ok()) return s;
    }
    return fields.status();
  }
  if (type == "ByteLevel") {
    if (fields.Bool("add_prefix_space", true)) steps_.push_back({.kind = Kind::kPrefixSpace});
    const bool use_regex = fields.Bool("use_regex", true);
    if (!fields.status().ok()) return fields.status();
    byte_level_ = true;
    return use_regex ? AddSplit(kGpt2Pattern, Behavior::kIsolated, false) : absl::OkStatus();
  }
  if (type == "Digits") {
    const bool individual = fields.Bool("individual_digits", false);
    if (!fields.status().ok()) return fields.status();
    return AddSplit(individual ? R"(\p{N})" : R"(\p{N}+)", Behavior::kIsolated, false);
  }
  if (type == "Metaspace") {
    Step step = {.kind = Kind::kMetaspace};
    const std::string replacement = fields.String("replacement");
    const bool adds = fields.Bool("add_prefix_space", true);  // older files have this alone
    const std::string scheme = fields.OptionalString("prepend_scheme", adds ? "always" : "never");
    const bool split = fields.Bool("split", true);
    if (!fields.status().ok()) return fields.status();
    if (replacement != kMetaspace) {
      return absl::UnimplementedError(
          absl::StrCat("pre_tokenizer: Metaspace's replacement is '", replacement.substr(0, 16), "'; known is U+2581"));
    }
    if (scheme == "first")
      step.prepend = Prepend::kFirst;
    else if (scheme == "never")
      step.prepend = Prepend::kNever;
    else if (scheme != "always") {
      return absl::InvalidArgumentError(
          absl::StrCat("pre_tokenizer: prepend_scheme is '", scheme.substr(0, 40), "'; known are always, first, never"));
    }
    steps_.push_back(step);
    return split ? AddSplit(kMetaspace, Behavior::kMergedWithNext, false) : absl::OkStatus();
  }
  if (type == "Split") {
    const TextPattern pattern = fields.Pattern("pattern");
    const std::string behavior = fields.String("behavior");
    const bool invert = fields.Bool("invert", false);
    if (!fields.status().ok()) return fields.status();
    constexpr std::pair<const char*, Behavior> kBehaviors[] = {{"Removed", Behavior::kRemoved},
                                                               {"Isolated", Behavior::kIsolated},
                                                               {"MergedWithPrevious", Behavior::kMergedWithPrevious},
                                                               {"MergedWithNext", Behavior::kMergedWithNext},
                                                               {"Contiguous", Behavior::kContiguous}};
    for (const auto& [name, value] : kBehaviors) {
      if (behavior == name) return AddSplit(pattern.is_regex ? pattern.text : EscapeRegex(pattern.text), value, invert);
    }
    return absl::InvalidArgumentError(
        absl::StrCat("pre_tokenizer: behavior is '", behavior.substr(0, 40),
                     "'; known are Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous"));
  }
  return absl::UnimplementedError(
      absl::StrCat("pre_tokenizer: type is '", type.substr(0, 100), "'; known are ByteLevel, Digits, Metaspace, Split, Sequence"));
}

absl::Status PreTokenizer::SplitPiece(const Step& step, std::string_view piece, std::vector<std::string_view>& pieces) {
  size_t given = 0;
  // The common case needs no list of parts.
  if (step.behavior == Behavior::kIsolated) {
    const absl::Status status = step.pattern->ForEachMatch(piece, [&](size_t begin, size_t end) {
      if (given < begin) pieces.push_back(piece.substr(given, begin - given));
      pieces.push_back(piece.substr(begin, end - begin));
      given = end;
    });
    if (status.ok() && given < piece.size()) pieces.push_back(piece.substr(given));
    return status;
  }
  std::vector<Part> parts;
  const absl::Status status = step.pattern->ForEachMatch(piece, [&](size_t begin, size_t end) {
    if (given < begin) parts.push_back({piece.substr(given, begin - given), step.invert});
    parts.push_back({piece.substr(begin, end - begin), !step.invert});
    given = end;
  });
  if (!status.ok()) return status;
  if (given < piece.size()) parts.push_back({piece.substr(given), step.invert});

  const auto join = [](std::string_view left, std::string_view right) {
    return std::string_view(left.data(), left.size() + right.size());
  };
  std::vector<std::string_view> joined;
  bool previous = false;  // of the part before (or after): whether it matches
  switch (step.behavior) {
    case Behavior::kIsolated:
      break;
    case Behavior::kRemoved:
      for (const Part& part : parts) {
        if (!part.matches) joined.push_back(part.text);
      }
      break;
    case Behavior::kContiguous:
      for (size_t i = 0; i < parts.size(); ++i) {
        if (i > 0 && parts[i].matches == parts[i - 1].matches)
          joined.back() = join(joined.back(), parts[i].text);
        else
          joined.push_back(parts[i].text);
      }
      break;
    case Behavior::kMergedWithPrevious:
      for (const Part& part : parts) {
        if (part.matches && !previous && !joined.empty())
          joined.back() = join(joined.back(), part.text);
        else
          joined.push_back(part.text);
        previous = part.matches;
      }
      break;
    case Behavior::kMergedWithNext:
      for (size_t i = parts.size(); i-- > 0;) {
        if (parts[i].matches && !previous && !joined.empty())
          joined.back() = join(parts[i].text, joined.back());
        else
          joined.push_back(parts[i].text);
        previous = parts[i].matches;
      }
      std::reverse(joined.begin(), joined.end());
      break;
  }
  pieces.insert(pieces.end(), joined.begin(), joined.end());
  return absl::OkStatus();
}

absl::Status PreTokenizer::Split(std::string_view text, bool starts_text, std::deque<std::string>& written,
                                 std::vector<std::string_view>& pieces) const {
  std::vector<std::string_view> before = {text};
  for (const Step& step : steps_) {
    std::vector<std::string_view> after;
    after.reserve(before.size() == 1 ? text.size() / 4 + 1 : before.size());
    for (const std::string_view piece : before) {
      if (step.kind == Kind::kSplit) {
        if (absl::Status s = SplitPiece(step, piece, after); !s.ok()) return s;
      } else if (step.kind == Kind::kPrefixSpace) {
        after.push_back(piece.starts_with(' ') ? piece : written.emplace_back(" " + std::string(piece)));
      } else {
        std::string& replaced = written.emplace_back(absl::StrReplaceAll(std::string(piece), {{" ", kMetaspace}}));
        const bool prepends = step.prepend == Prepend::kAlways ||
                              (step.prepend == Prepend::kFirst && starts_text && piece.data() == before.front().data());
        if (prepends && !replaced.starts_with(kMetaspace)) replaced.insert(0, kMetaspace);
        after.push_back(replaced);
      }
    }
    before = std::move(after);
  }
  pieces.insert(pieces.end(), before.begin(), before.end());
  return absl::OkStatus();
}

}  // namespace memserve::engine
