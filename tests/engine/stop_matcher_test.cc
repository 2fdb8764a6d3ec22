#include "engine/stop_matcher.h"

#include <gtest/gtest.h>

namespace memserve::engine {
namespace {

TEST(StopMatcherTest, ShowsEverythingWithoutStopStrings) {
  StopMatcher matcher({});
  EXPECT_EQ(matcher.Append("abc"), "abc");
  EXPECT_EQ(matcher.Finish(), "");
  EXPECT_FALSE(matcher.matched());
}

TEST(StopMatcherTest, FindsAStopStringAcrossPiecesAndHidesIt) {
  StopMatcher matcher({"</s>"});
  EXPECT_EQ(matcher.Append("one <"), "one ");
  EXPECT_EQ(matcher.Append("/"), "");
  EXPECT_EQ(matcher.Append("s> two"), "");
  EXPECT_EQ(matcher.matched(), "</s>");
  EXPECT_EQ(matcher.Append("more"), "");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopMatcherTest, GivesBackWhatOnlyLookedLikeAStopString) {
  StopMatcher matcher({"END"});
  EXPECT_EQ(matcher.Append("xEN"), "x");
  EXPECT_EQ(matcher.Append("Y"), "ENY");
  EXPECT_EQ(matcher.Append("E"), "");
  EXPECT_EQ(matcher.Finish(), "E");
}

TEST(StopMatcherTest, TheFirstInTheTextWinsThenTheLongest) {
  StopMatcher first({"b", "a"});
  EXPECT_EQ(first.Append("xaxb"), "x");
  EXPECT_EQ(first.matched(), "a");
  StopMatcher longest({"ab", "abc"});
  EXPECT_EQ(longest.Append("xabcd"), "x");
  EXPECT_EQ(longest.matched(), "abc");
}

TEST(StopMatcherTest, OverlappingBeginningsAreHeldBackOnlyAsFarAsNeeded) {
  StopMatcher matcher({"aab"});
  EXPECT_EQ(matcher.Append("aaa"), "a");
  EXPECT_EQ(matcher.Append("b"), "");
  EXPECT_EQ(matcher.matched(), "aab");
}

// However the text is cut, the shown text is the same.
TEST(StopMatcherTest, PiecesDoNotMatter) {
  const std::string text = "abcabdababcabcabdabEND and more";
  for (const std::vector<std::string>& stops : {std::vector<std::string>{"END"}, {"abdab"}, {"abcabcabd", "zzz"}, {"nothing"}}) {
    StopMatcher whole(stops);
    const std::string expected = whole.Append(text) + whole.Finish();
    for (size_t size = 1; size < 9; ++size) {
      StopMatcher matcher(stops);
      std::string shown;
      for (size_t at = 0; at < text.size(); at += size) shown += matcher.Append(text.substr(at, size));
      EXPECT_EQ(shown + matcher.Finish(), expected) << stops[0] << " in pieces of " << size;
      EXPECT_EQ(matcher.matched(), whole.matched());
    }
  }
}

}  // namespace
}  // namespace memserve::engine
