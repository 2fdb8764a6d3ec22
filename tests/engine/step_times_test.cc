#include "engine/step_times.h"

#include <gtest/gtest.h>

namespace memserve::engine {
namespace {

TEST(StepTimesTest, LimitsPromptsSoThatAStepTakesAtMostTwoAndAHalfDecodeSteps) {
  StepTimes times;
  EXPECT_EQ(times.PrefillLimit(), INT64_MAX) << "nothing is known yet";
  times.Add(0, 100, absl::Milliseconds(20));
  EXPECT_EQ(times.PromptToken(), absl::Microseconds(200));
  EXPECT_EQ(times.PrefillLimit(), INT64_MAX);
  times.Add(8, 0, absl::Milliseconds(4));
  EXPECT_EQ(times.PrefillLimit(), 30) << "1.5 × 4 ms of 0.2 ms each";
}

TEST(StepTimesTest, OfAMixedStepThePromptHasWhatIsBeyondADecodeStep) {
  StepTimes times;
  times.Add(4, 10, absl::Milliseconds(9));
  EXPECT_EQ(times.PromptToken(), absl::ZeroDuration()) << "the decode part is not known yet";
  times.Add(4, 0, absl::Milliseconds(4));
  times.Add(4, 10, absl::Milliseconds(9));
  EXPECT_EQ(times.PromptToken(), absl::Microseconds(500));
  times.Add(4, 10, absl::Milliseconds(3));
  EXPECT_EQ(times.PromptToken(), absl::Microseconds(450)) << "never less than nothing, and one measurement does not decide";
}

TEST(StepTimesTest, AtLeastOneTokenGoesOn) {
  StepTimes times;
  times.Add(1, 0, absl::Microseconds(1));
  times.Add(0, 1, absl::Seconds(1));
  EXPECT_EQ(times.PrefillLimit(), 1);
}

}  // namespace
}  // namespace memserve::engine
