#include "server/load_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace memserve::server {
namespace {

TEST(LoadLogTest, TellsWhatWasDoneSinceTheLastLineWhileThereIsWork) {
  LoadLog log(absl::Seconds(10));
  engine::Load load;
  const absl::Time begin = absl::FromUnixSeconds(1000);
  EXPECT_EQ(log.Line(load, begin), std::nullopt) << "nothing to compare with";
  load = {.requests = 9,
          .running = 7,
          .waiting = 2,
          .preempted = 1,
          .waiting_tokens = 30,
          .kv_pages_total = 100,
          .kv_pages_used = 60,
          .kv_pages_cached = 15,
          .steps = 50,
          .prompt_tokens = 4000,
          .completion_tokens = 200,
          .recent = {.median_seconds = 0.003, .p99_seconds = 0.0125}};
  EXPECT_EQ(log.Line(load, begin + absl::Seconds(9)), std::nullopt) << "not yet";
  EXPECT_EQ(log.Line(load, begin + absl::Seconds(10)),
            "load: 7 running, 2 waiting (1 preempted, 30 tokens); pages 60 used, 15 cached, 25 free; prompt 400 tokens/s, drawn 20 "
            "tokens/s; "
            "5 steps/s of 3.00 ms (median; p99 12.50)");
  load.requests = 0;
  EXPECT_EQ(log.Line(load, begin + absl::Seconds(20)), std::nullopt) << "nothing was done";
  load.steps = 51;
  EXPECT_NE(log.Line(load, begin + absl::Seconds(31)), std::nullopt);
  LoadLog never(absl::ZeroDuration());
  never.Line(load, begin);
  load.steps = 99;
  EXPECT_EQ(never.Line(load, begin + absl::Hours(1)), std::nullopt);
}

}  // namespace
}  // namespace memserve::server
