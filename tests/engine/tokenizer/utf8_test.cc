#include "engine/tokenizer/utf8.h"

#include <gtest/gtest.h>

#include <random>

namespace memserve::engine {
namespace {

constexpr char kBad[] = "\xef\xbf\xbd";

TEST(Utf8JoinerTest, JoinsCharactersThatArriveInPieces) {
  Utf8Joiner joiner;
  EXPECT_EQ(joiner.Append("a\xe2"), "a");
  EXPECT_EQ(joiner.Append("\x82"), "");
  EXPECT_EQ(joiner.Append("\xac!"), "\xe2\x82\xac!");
  EXPECT_EQ(joiner.Append("\xf0\x9f\x98"), "");
  EXPECT_EQ(joiner.Append("\x80"), "\xf0\x9f\x98\x80");
  EXPECT_EQ(joiner.Finish(), "");
}

TEST(Utf8JoinerTest, BrokenPartsBecomeReplacementCharacters) {
  EXPECT_EQ(ToValidUtf8("\xff"), kBad);
  EXPECT_EQ(ToValidUtf8("a\x80z"), std::string("a") + kBad + "z");
  EXPECT_EQ(ToValidUtf8("\xe2\x82"), kBad);                             // unfinished
  EXPECT_EQ(ToValidUtf8("\xe2\x28"), std::string(kBad) + "(");          // interrupted
  EXPECT_EQ(ToValidUtf8("\xc0\xaf"), std::string(kBad) + kBad);         // overlong
  EXPECT_EQ(ToValidUtf8("\xed\xa0\x80"), std::string(kBad) + kBad + kBad);  // a surrogate
  EXPECT_EQ(ToValidUtf8("\xf4\x90\x80\x80"), std::string(kBad) + kBad + kBad + kBad);  // beyond U+10FFFF
}

// Python's bytes.decode("utf-8", "replace") gives the same on these (checked there).
TEST(Utf8JoinerTest, PiecesDoNotMatter) {
  std::mt19937 random(3);
  const std::string alphabet = "a\x80\xbf\xc3\xe0\xe2\x82\xac\xed\x9f\xf0\x90\xf4\xff";
  for (int round = 0; round < 2000; ++round) {
    std::string bytes;
    for (int i = 0; i < 12; ++i) bytes += alphabet[random() % alphabet.size()];
    Utf8Joiner joiner;
    std::string joined;
    for (size_t at = 0; at < bytes.size();) {
      const size_t size = 1 + random() % 4;
      joined += joiner.Append(bytes.substr(at, size));
      at += size;
    }
    EXPECT_EQ(joined + joiner.Finish(), ToValidUtf8(bytes));
  }
}

}  // namespace
}  // namespace memserve::engine
