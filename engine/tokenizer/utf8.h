// UTF-8 that arrives in pieces.
#pragma once

#include <string>
#include <string_view>

namespace memserve::engine {

// What stands for one U+FFFD: a maximal broken part (Unicode's recommended practice), or each byte of it (as SentencePiece has it).
enum class BrokenUtf8 { kEachPart, kEachByte };

// Joins bytes into whole characters. What is no UTF-8 comes out as U+FFFD; what may still become a character is held back.
class Utf8Joiner {
 public:
  explicit Utf8Joiner(BrokenUtf8 broken = BrokenUtf8::kEachPart) : broken_(broken) {}
  // The text that `bytes` completed.
  std::string Append(std::string_view bytes);
  // What was held back, as U+FFFD if it is unfinished.
  std::string Finish();

 private:
  const BrokenUtf8 broken_;
  std::string held_;  // at most 3 bytes: the beginning of a character
};

// The same for a whole text.
std::string ToValidUtf8(std::string_view bytes);

// Where the first byte lies that is no UTF-8; npos: there is none.
size_t FindBrokenUtf8(std::string_view bytes);

// Bytes of the character at the front of `text`, which is valid UTF-8 and not empty.
inline size_t CharacterBytes(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

}  // namespace memserve::engine
