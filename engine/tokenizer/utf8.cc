#include "engine/tokenizer/utf8.h"

#include <cstdint>
#include <cstring>

namespace memserve::engine {
namespace {

constexpr char kReplacement[] = "\xef\xbf\xbd";

// How `text` begins: `length` bytes of a whole character, of a broken part, or (if unfinished) of what may become a character.
struct Start {
  size_t length;
  bool valid;
  bool unfinished;
};

// Unicode 15, table 3-7 (well-formed UTF-8 byte sequences).
Start NextCharacter(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {1, true, false};
  size_t needed = 0;
  uint8_t low = 0x80;
  uint8_t high = 0xbf;
  if (lead >= 0xc2 && lead <= 0xdf) needed = 2;
  else if (lead >= 0xe0 && lead <= 0xef) needed = 3;
  else if (lead >= 0xf0 && lead <= 0xf4) needed = 4;
  else return {1, false, false};
  if (lead == 0xe0) low = 0xa0;
  if (lead == 0xed) high = 0x9f;
  if (lead == 0xf0) low = 0x90;
  if (lead == 0xf4) high = 0x8f;
  for (size_t i = 1; i < needed; ++i) {
    if (i == text.size()) return {i, false, true};
    if (byte(i) < low || byte(i) > high) return {i, false, false};
    low = 0x80;
    high = 0xbf;
  }
  return {needed, true, false};
}

}  // namespace

std::string Utf8Joiner::Append(std::string_view bytes) {
  held_.append(bytes);
  std::string out;
  size_t at = 0;
  while (at < held_.size()) {
    const Start start = NextCharacter(std::string_view(held_).substr(at));
    if (start.unfinished) break;
    if (start.valid) {
      out.append(held_, at, start.length);
    } else {
      for (size_t i = 0; i < (broken_ == BrokenUtf8::kEachByte ? start.length : 1); ++i) out.append(kReplacement);
    }
    at += start.length;
  }
  held_.erase(0, at);
  return out;
}

std::string Utf8Joiner::Finish() {
  std::string out;
  const size_t parts = held_.empty() ? 0 : broken_ == BrokenUtf8::kEachByte ? held_.size() : 1;
  for (size_t i = 0; i < parts; ++i) out.append(kReplacement);
  held_.clear();
  return out;
}

std::string ToValidUtf8(std::string_view bytes) {
  Utf8Joiner joiner;
  std::string text = joiner.Append(bytes);
  return text + joiner.Finish();
}

size_t FindBrokenUtf8(std::string_view bytes) {
  size_t at = 0;
  while (at < bytes.size()) {
    // Eight bytes of ASCII at once: most texts are mostly that.
    uint64_t word = 0;
    if (at + sizeof(word) <= bytes.size()) {
      std::memcpy(&word, bytes.data() + at, sizeof(word));
      if ((word & 0x8080808080808080u) == 0) {
        at += sizeof(word);
        continue;
      }
    }
    const Start start = NextCharacter(bytes.substr(at));
    if (!start.valid) return at;
    at += start.length;
  }
  return std::string_view::npos;
}

}  // namespace memserve::engine
