#include "engine/tokenizer/normalizer.h"

#include <cstdlib>

#include <utf8proc.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/tokenizer/tokenizer_json.h"
#include "engine/tokenizer/utf8.h"

namespace memserve::engine {
namespace {

constexpr size_t kMaxSteps = 64;
constexpr size_t kMaxGrowth = 64;  // of a text by one step: steps come with checkpoints and may be hostile

// Whether no character of the text can change in NFC or join another: the greater part of the scripts in use, by ranges. All
// characters of these ranges have the property NFC_Quick_Check = Yes and combining class 0.
bool IsSurelyNfc(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    if (static_cast<unsigned char>(text[at]) < 0x80) {
      ++at;
      continue;
    }
    utf8proc_int32_t c = 0;
    at += static_cast<size_t>(utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at,
                                               static_cast<utf8proc_ssize_t>(text.size() - at), &c));
    const bool sure = c < 0x300 || (c >= 0x400 && c < 0x483) || (c >= 0x2010 && c < 0x2027) || (c >= 0x3041 && c <= 0x3096) ||
                      (c >= 0x30a1 && c <= 0x30fa) || (c >= 0x4e00 && c <= 0x9fff) || (c >= 0xac00 && c <= 0xd7a3) ||
                      (c >= 0xff01 && c <= 0xff9d) || (c >= 0x1f300 && c <= 0x1faff);
    if (!sure) return false;
  }
  return true;
}

absl::StatusOr<std::string> Map(const std::string& text, int options) {
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()), &mapped,
                   static_cast<utf8proc_option_t>(options));
  if (size < 0) return absl::InvalidArgumentError(absl::StrCat("text: cannot be normalised: ", utf8proc_errmsg(size)));
  std::string result(reinterpret_cast<const char*>(mapped), static_cast<size_t>(size));
  std::free(mapped);
  return result;
}

std::string Strip(std::string text, bool left, bool right) {
  const auto is_space = [](unsigned char c) { return c == ' ' || (c >= 9 && c <= 13); };
  size_t begin = 0;
  size_t end = text.size();
  while (left && begin < end && is_space(static_cast<unsigned char>(text[begin]))) ++begin;
  while (right && end > begin && is_space(static_cast<unsigned char>(text[end - 1]))) --end;
  return text.substr(begin, end - begin);
}

}  // namespace

absl::StatusOr<Normalizer> Normalizer::Parse(const nlohmann::json& description) {
  Normalizer normalizer;
  if (absl::Status s = normalizer.Add(description, 0); !s.ok()) return s;
  return normalizer;
}

absl::Status Normalizer::Add(const nlohmann::json& description, int depth) {
  if (description.is_null()) return absl::OkStatus();
  if (steps_.size() >= kMaxSteps || depth > 4) return absl::InvalidArgumentError("normalizer: has too many steps");
  JsonFields fields(description, "normalizer");
  const std::string type = fields.String("type");
  if (type == "Sequence") {
    for (const nlohmann::json& part : fields.Array("normalizers")) {
      if (absl::Status s = Add(part, depth + 1); !s.ok()) return s;
    }
    return fields.status();
  }
  Step step{};
  if (type == "NFC")
    step.kind = Kind::kNfc;
  else if (type == "NFD")
    step.kind = Kind::kNfd;
  else if (type == "NFKC")
    step.kind = Kind::kNfkc;
  else if (type == "NFKD")
    step.kind = Kind::kNfkd;
  else if (type == "Lowercase")
    step.kind = Kind::kLowercase;
  else if (type == "Prepend") {
    step.kind = Kind::kPrepend;
    step.to = fields.String("prepend");
  } else if (type == "Strip") {
    step.kind = Kind::kStrip;
    step.left = fields.Bool("strip_left", true);
    step.right = fields.Bool("strip_right", true);
  } else if (type == "Replace") {
    step.kind = Kind::kReplace;
    step.to = fields.String("content");
    const TextPattern pattern = fields.Pattern("pattern");
    if (fields.status().ok() && pattern.is_regex) {
      step.kind = Kind::kReplacePattern;
      absl::StatusOr<std::unique_ptr<Regex>> regex = Regex::Compile(pattern.text);
      if (!regex.ok()) return absl::InvalidArgumentError(absl::StrCat("normalizer: ", regex.status().message()));
      step.pattern = *std::move(regex);
    } else if (fields.status().ok() && pattern.text.empty()) {
      return absl::InvalidArgumentError("normalizer: Replace has an empty pattern");
    }
    step.from = pattern.text;
  } else if (fields.status().ok()) {
    return absl::UnimplementedError(
        absl::StrCat("normalizer: type is '", type.substr(0, 100),
                     "'; known are NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip, Sequence"));
  }
  if (!fields.status().ok()) return fields.status();
  steps_.push_back(std::move(step));
  return absl::OkStatus();
}

absl::StatusOr<std::string> Normalizer::Apply(std::string text) const {
  for (const Step& step : steps_) {
    absl::StatusOr<std::string> mapped = std::string();
    const size_t size = text.size();
    switch (step.kind) {
      case Kind::kNfc:
        if (IsSurelyNfc(text)) continue;
        mapped = Map(text, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        break;
      case Kind::kNfd:
        mapped = Map(text, UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
        break;
      case Kind::kNfkc:
        mapped = Map(text, UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT);
        break;
      case Kind::kNfkd:
        mapped = Map(text, UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT);
        break;
      case Kind::kLowercase: {
        std::string lower;
        for (size_t at = 0; at < text.size();) {
          utf8proc_int32_t c = 0;
          at += static_cast<size_t>(utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at,
                                                     static_cast<utf8proc_ssize_t>(text.size() - at), &c));
          utf8proc_uint8_t bytes[4];
          const utf8proc_ssize_t length = utf8proc_encode_char(utf8proc_tolower(c), bytes);
          lower.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(length));
        }
        mapped = std::move(lower);
        break;
      }
      case Kind::kPrepend:
        mapped = text.empty() ? text : step.to + text;
        break;
      case Kind::kReplace:
        mapped = absl::StrReplaceAll(text, {{step.from, step.to}});
        break;
      case Kind::kReplacePattern: {
        std::string replaced;
        size_t kept = 0;
        const absl::Status status = step.pattern->ForEachMatch(text, [&](size_t begin, size_t end) {
          replaced.append(text, kept, begin - kept);
          replaced.append(step.to);
          kept = end;
        });
        if (!status.ok()) return status;
        replaced.append(text, kept);
        mapped = std::move(replaced);
        break;
      }
      case Kind::kStrip:
        mapped = Strip(std::move(text), step.left, step.right);
        break;
    }
    if (!mapped.ok()) return mapped.status();
    text = *std::move(mapped);
    if (text.size() > kMaxGrowth * (size + 64)) {
      return absl::InvalidArgumentError(absl::StrCat("text: the tokenizer's normalizer makes ", text.size(), " bytes of ", size));
    }
  }
  return text;
}

}  // namespace memserve::engine
