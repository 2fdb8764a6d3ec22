#include "engine/tokenizer/added_tokens.h"

#include <algorithm>

#include <utf8proc.h>

namespace memserve::engine {
namespace {

int32_t CharacterAt(std::string_view text) {
  utf8proc_int32_t character = -1;
  utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()), &character);
  return character;
}

size_t LastCharacterBytes(std::string_view text) {
  size_t begin = text.size() - 1;
  while (begin > 0 && (text[begin] & 0xc0) == 0x80) --begin;
  return text.size() - begin;
}

bool IsSpace(int32_t character) {
  if ((character >= 9 && character <= 13) || character == 0x85) return true;
  const utf8proc_category_t category = utf8proc_category(character);
  return category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL || category == UTF8PROC_CATEGORY_ZP;
}

// Regular expressions' \w.
bool IsWord(int32_t character) {
  const utf8proc_category_t category = utf8proc_category(character);
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_ME) || category == UTF8PROC_CATEGORY_ND ||
         category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_PC;
}

size_t SpaceAtEnd(std::string_view text) {
  size_t size = 0;
  while (size < text.size()) {
    const std::string_view rest = text.substr(0, text.size() - size);
    const size_t bytes = LastCharacterBytes(rest);
    if (!IsSpace(CharacterAt(rest.substr(rest.size() - bytes)))) break;
    size += bytes;
  }
  return size;
}

size_t SpaceAtStart(std::string_view text) {
  size_t size = 0;
  while (size < text.size() && IsSpace(CharacterAt(text.substr(size)))) size += CharacterBytes(text.substr(size));
  return size;
}

}  // namespace

void AddedTokens::Add(const AddedToken& token, const std::string& content) {
  if (content.empty()) return;
  int32_t node = 0;
  for (const char c : content) {
    const uint64_t key = static_cast<uint64_t>(node) << 8 | static_cast<unsigned char>(c);
    const auto [it, added] = edges_.emplace(key, static_cast<int32_t>(ends_.size()));
    if (added) ends_.push_back(-1);
    node = it->second;
  }
  starts_[static_cast<unsigned char>(content[0])] = true;
  ends_[node] = static_cast<int>(tokens_.size());
  tokens_.push_back(token);
}

int AddedTokens::Longest(std::string_view text, size_t* length) const {
  int found = -1;
  int32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto it = edges_.find(static_cast<uint64_t>(node) << 8 | static_cast<unsigned char>(text[i]));
    if (it == edges_.end()) break;
    node = it->second;
    if (ends_[node] < 0) continue;
    found = ends_[node];
    *length = i + 1;
  }
  return found;
}

absl::Status AddedTokens::Split(std::string_view text, size_t offset, const EncodeOptions& options,
                                absl::FunctionRef<absl::Status(std::string_view, size_t)> on_text,
                                absl::FunctionRef<void(int32_t)> on_token) const {
  size_t given = 0;  // of the text, to the callbacks
  size_t literal = 0;
  for (size_t at = 0; at < text.size() && !tokens_.empty();) {
    size_t length = 0;
    const int index = starts_[static_cast<unsigned char>(text[at])] ? Longest(text.substr(at), &length) : -1;
    if (index < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[index];
    size_t begin = at;
    size_t end = at + length;
    at = end;
    if (token.special) {
      if (!options.allow_special) continue;
      while (literal < options.literal.size() && options.literal[literal].end <= offset + begin) ++literal;
      if (literal < options.literal.size() && options.literal[literal].begin < offset + end) continue;
    }
    if (token.single_word) {
      const bool touched_before = begin > 0 && IsWord(CharacterAt(text.substr(begin - LastCharacterBytes(text.substr(0, begin)))));
      const bool touched_after = end < text.size() && IsWord(CharacterAt(text.substr(end)));
      if (touched_before || touched_after) continue;
    }
    if (token.lstrip) begin = std::max(given, begin - SpaceAtEnd(text.substr(0, begin)));
    if (token.rstrip) end += SpaceAtStart(text.substr(end));
    if (given < begin) {
      if (absl::Status s = on_text(text.substr(given, begin - given), offset + given); !s.ok()) return s;
    }
    on_token(token.id);
    given = std::max(given, end);
  }
  if (given < text.size()) return on_text(text.substr(given), offset + given);
  return absl::OkStatus();
}

}  // namespace memserve::engine
