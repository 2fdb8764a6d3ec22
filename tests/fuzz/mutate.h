// Changes bytes at random, the same for the same generator: what a bad disk, a bad tool or a bad person does to a file.
#pragma once

#include <algorithm>
#include <random>
#include <string>

namespace memserve::fuzz {

// One to four changes in the first `reach` bytes, and now and then a cut.
inline std::string Mutate(std::string content, std::mt19937& random, size_t reach = std::string::npos) {
  static const char* const kPieces[] = {"0", "-1", "18446744073709551615", "1e308", "null", "true", "\"\"", "[]", "{}", "[", "}", "\"", ",", ":", "\\u0000", "\xff", "NaN"};
  for (uint32_t changes = 1 + random() % 4; changes > 0 && !content.empty(); --changes) {
    const size_t at = random() % std::min(reach, content.size());
    const size_t length = 1 + random() % 8;
    switch (random() % 6) {
      case 0:
        content[at] = static_cast<char>(random());
        break;
      case 1:
        content.erase(at, length);
        break;
      case 2:
        content.insert(at, kPieces[random() % std::size(kPieces)]);
        break;
      case 3:  // a piece from elsewhere
        content.insert(at, content.substr(random() % std::min(reach, content.size()), 4 * length));
        break;
      case 4:  // another digit
        if (const size_t digit = content.find_first_of("0123456789", at); digit != std::string::npos) content[digit] = static_cast<char>('0' + random() % 10);
        break;
      default:
        if (random() % 4 == 0) content.resize(random() % content.size());
    }
  }
  return content;
}

}  // namespace memserve::fuzz
