// UTF-8 that arrives in pieces.
#pragma once

#include <string>
#include <string_view>

namespace memserve::engine {

// Joins bytes into whole characters. What is no UTF-8 comes out as U+FFFD, one for each maximal broken part (Unicode's recommended
// practice); what may still become a character is held back.
class Utf8Joiner {
 public:
  // The text that `bytes` completed.
  std::string Append(std::string_view bytes);
  // What was held back, as U+FFFD if it is unfinished.
  std::string Finish();

 private:
  std::string held_;  // at most 3 bytes: the beginning of a character
};

// The same for a whole text.
std::string ToValidUtf8(std::string_view bytes);

}  // namespace memserve::engine
