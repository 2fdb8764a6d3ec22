#include "engine/step_times.h"

#include <cmath>
#include <random>
#include <utility>

#include "gtest/gtest.h"

namespace memserve::engine {
namespace {

// A machine whose steps take just so long, give or take a share.
struct Machine {
  double base_ms, token_ms, key_us;
  double noise = 0;
  std::mt19937 random{1};

  double Ms(const StepWork& work) {
    const double ms = base_ms + static_cast<double>(work.tokens) * token_ms + 1e-3 * key_us * static_cast<double>(work.keys);
    return ms * (1 + noise * std::uniform_real_distribution<double>(-1, 1)(random));
  }
  void Step(const StepWork& work, StepTimes& times) { times.Add(work, absl::Milliseconds(Ms(work))); }
};

// So many sequences decode at this position.
StepWork Decodes(int64_t count, int64_t position) {
  StepWork work;
  for (int64_t i = 0; i < count; ++i) work.Add(position, 1);
  return work;
}

double Ms(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

TEST(StepTimesTest, KnowsNothingBeforeTheFirstStep) {
  const StepTimes times;
  EXPECT_FALSE(times.known());
  EXPECT_EQ(times.PrefillLimit(Decodes(8, 10), Decodes(8, 10), 0), INT64_MAX);
  EXPECT_EQ(times.PromptToken(), absl::ZeroDuration());
}

TEST(StepTimesTest, CountsTokensAndTheKeysTheySee) {
  StepWork work;
  work.Add(0, 3);  // 1 + 2 + 3 keys
  work.Add(9, 1);  // 10
  EXPECT_EQ(work.tokens, 4);
  EXPECT_EQ(work.keys, 16);
}

TEST(StepTimesTest, LimitsPromptsSoThatAStepTakesAtMostTwoDecodeSteps) {
  const StepTimes times(absl::Milliseconds(2), absl::Microseconds(200), absl::Microseconds(1));
  const StepWork decodes = Decodes(8, 99);  // 2 + 1.6 + 0.8 ms
  EXPECT_EQ(Ms(times.Expected(decodes)), 4.4);
  // Room for 4.4 ms: 20 tokens of 0.2 ms and 20 · 21 / 2 keys; at position 2,000 two tokens of 2.2 ms fit not quite.
  EXPECT_EQ(times.PrefillLimit(decodes, decodes, 0), 20);
  EXPECT_EQ(times.PrefillLimit(decodes, decodes, 2000), 1);
  StepWork work = decodes;
  work.Add(0, 20);
  EXPECT_EQ(times.PrefillLimit(decodes, work, 0), 0) << "another prompt has taken what there was";
}

TEST(StepTimesTest, TellsBaseTokensAndKeysApart) {
  StepTimes times;
  Machine machine{.base_ms = 2, .token_ms = 0.2, .key_us = 0.5, .noise = 0.1};
  for (int i = 0; i < 300; ++i) {
    StepWork work = Decodes(1 + i % 13, 10 * i);
    if (i % 3 == 0) work.Add(0, 100);
    machine.Step(work, times);
  }
  EXPECT_NEAR(Ms(times.Expected(Decodes(1, 0))), 2.2, 0.3);
  EXPECT_NEAR(Ms(times.PromptToken()), 0.2, 0.03);
  EXPECT_NEAR(Ms(times.Expected(Decodes(8, 3999))), 19.6, 2);
}

// A busy server has a prompt in every step. Its decode steps are longer than when it began, which no step tells by itself.
TEST(StepTimesTest, LearnsFromMixedStepsAlone) {
  StepTimes times;
  Machine machine{.base_ms = 1, .token_ms = 0.3, .key_us = 0.3, .noise = 0.2};
  StepWork first;
  first.Add(0, 64);
  machine.Step(first, times);
  int64_t decodes = 1;
  for (int i = 0; i < 400; ++i) {
    const StepWork alone = Decodes(decodes, 100);
    StepWork work = alone;
    work.Add(0, std::max<int64_t>(1, times.PrefillLimit(alone, alone, 0)));
    machine.Step(work, times);
    if (decodes < 60 && i % 4 == 0) ++decodes;
  }
  machine.noise = 0;
  const StepWork alone = Decodes(60, 100);
  StepWork work = alone;
  work.Add(0, times.PrefillLimit(alone, alone, 0));
  EXPECT_LT(machine.Ms(work), 3 * machine.Ms(alone));
  EXPECT_GT(machine.Ms(work), 2 * machine.Ms(alone)) << "prompts would starve: " << work.tokens - alone.tokens;
}

TEST(StepTimesTest, ALongPromptsChunksShrinkAsItsKeysGrow) {
  StepTimes times;
  Machine machine{.base_ms = 1, .token_ms = 0.3, .key_us = 0.1, .noise = 0.1};
  const StepWork alone = Decodes(8, 100);
  StepWork first;
  first.Add(0, 64);
  machine.Step(first, times);
  for (int i = 0; i < 50; ++i) machine.Step(alone, times);
  for (int64_t position = 0; position < 4000;) {
    StepWork work = alone;
    const int64_t chunk = std::max<int64_t>(1, times.PrefillLimit(alone, alone, position));
    work.Add(position, chunk);
    const double noise = std::exchange(machine.noise, 0);
    // Of the first chunk, base and tokens are not told apart yet.
    EXPECT_LT(machine.Ms(work), (position == 0 ? 3.5 : 3) * machine.Ms(alone)) << position << " + " << chunk;
    if (position > 500) {
      EXPECT_GT(machine.Ms(work), 1.5 * machine.Ms(alone)) << position << " + " << chunk;
    }
    machine.noise = noise;
    machine.Step(work, times);
    position += chunk;
  }
}

TEST(StepTimesTest, OneStepThatWasHeldUpDoesNotDecide) {
  StepTimes times;
  Machine machine{.base_ms = 2, .token_ms = 0.2, .key_us = 0.5, .noise = 0.1};
  StepWork prompt;
  prompt.Add(0, 512);
  const StepWork alone = Decodes(8, 100);
  for (int i = 0; i < 50; ++i) {
    machine.Step(prompt, times);
    machine.Step(alone, times);
  }
  const double before = Ms(times.Expected(alone));
  times.Add(alone, absl::Seconds(5));
  EXPECT_LT(Ms(times.Expected(alone)), 1.3 * before);
}

}  // namespace
}  // namespace memserve::engine
