// What the engine and its grammar worker say to each other over a socket: frames of a length and so many bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/request.h"

namespace memserve::engine {

// The status codes of an answer's first byte; the rest is what was compiled, or the message.
enum class GrammarAnswer : char { kCompiled = 0, kInvalid = 1, kTooLarge = 2 };

inline void AppendNumber(uint32_t number, std::string* bytes) {
  for (int shift = 0; shift < 32; shift += 8) bytes->push_back(static_cast<char>(number >> shift & 255));
}

// Takes a number from the front. False: there is none.
inline bool TakeNumber(std::string_view* bytes, uint32_t* number) {
  if (bytes->size() < 4) return false;
  *number = 0;
  for (int i = 0; i < 4; ++i) *number |= static_cast<uint32_t>(static_cast<unsigned char>((*bytes)[i])) << 8 * i;
  bytes->remove_prefix(4);
  return true;
}

// A list of texts in one frame: the vocabulary, or a kind and its texts.
inline std::string JoinTexts(const std::vector<std::string>& texts) {
  std::string bytes;
  for (const std::string& text : texts) {
    AppendNumber(static_cast<uint32_t>(text.size()), &bytes);
    bytes += text;
  }
  return bytes;
}

inline std::optional<std::vector<std::string>> SplitTexts(std::string_view bytes) {
  std::vector<std::string> texts;
  while (!bytes.empty()) {
    uint32_t size = 0;
    if (!TakeNumber(&bytes, &size) || size > bytes.size()) return std::nullopt;
    texts.emplace_back(bytes.substr(0, size));
    bytes.remove_prefix(size);
  }
  return texts;
}

// The texts of a structured output: kind, text, choices. One that means the same gives the same.
inline std::vector<std::string> TextsOf(const StructuredOutput& structured) {
  std::vector<std::string> texts = {std::string(1, static_cast<char>(structured.kind)), structured.text};
  texts.insert(texts.end(), structured.choices.begin(), structured.choices.end());
  return texts;
}

}  // namespace memserve::engine
