#include "engine/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

namespace memserve::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::shared_ptr<Sequence> NewSequence(std::vector<int32_t> prompt, int64_t max_draws) {
  auto sequence = std::make_shared<Sequence>();
  sequence->control = std::make_shared<RequestControl>();
  sequence->prompt_tokens = static_cast<int64_t>(prompt.size());
  sequence->tokens = std::move(prompt);
  sequence->max_draws = max_draws;
  sequence->memory_knn = 8;
  return sequence;
}

std::shared_ptr<Sequence> NewScoring(std::vector<int32_t> tokens, int64_t score_begin) {
  std::shared_ptr<Sequence> sequence = NewSequence(std::move(tokens), 0);
  sequence->score_begin = score_begin;
  return sequence;
}

class SchedulerTest : public ::testing::Test {
 protected:
  StepPlan Next() { return scheduler_.Schedule(step_++, absl::Now()); }
  // As the engine does when a step's results are in: the token `drawn` for every slot.
  void Draw(const StepPlan& plan, int32_t drawn) {
    for (const std::shared_ptr<Sequence>& sequence : plan.sampled) {
      if (!sequence->ended) sequence->tokens.push_back(drawn);
    }
  }

  KvCache cache_{8, 16};
  Scheduler scheduler_{{.max_batch_tokens = 6, .max_sequences = 3}, &cache_};
  int64_t step_ = 0;
};

TEST_F(SchedulerTest, APromptIsCutIntoChunksAndOnlyItsLastTokenSamples) {
  scheduler_.Add(NewSequence({10, 11, 12, 13, 14, 15, 16, 17}, 3));
  const StepPlan first = Next();
  EXPECT_THAT(first.batch.token_ids, ElementsAre(10, 11, 12, 13, 14, 15));
  EXPECT_THAT(first.batch.logit_tokens, IsEmpty());
  EXPECT_EQ(first.prompt_tokens, 6);
  const StepPlan second = Next();
  EXPECT_THAT(second.batch.token_ids, ElementsAre(16, 17));
  EXPECT_THAT(second.batch.positions, ElementsAre(6, 7));
  EXPECT_THAT(second.batch.logit_tokens, ElementsAre(1));
  EXPECT_EQ(second.batch.sampling[0].position, 8u);
  Draw(second, 99);
  const StepPlan third = Next();
  EXPECT_THAT(third.batch.token_ids, ElementsAre(99));
  EXPECT_THAT(third.batch.from_slot, ElementsAre(-1));
  EXPECT_THAT(third.batch.positions, ElementsAre(8));
}

TEST_F(SchedulerTest, DecodeTokensGoBeforePrompts) {
  scheduler_.Add(NewSequence({1, 2}, 5));
  scheduler_.Add(NewSequence({3, 4, 5, 6, 7, 8, 9}, 5));
  const StepPlan first = Next();
  EXPECT_THAT(first.batch.token_ids, ElementsAre(1, 2, 3, 4, 5, 6));
  Draw(first, 50);
  const StepPlan second = Next();
  EXPECT_THAT(second.batch.token_ids, ElementsAre(50, 7, 8, 9));
  EXPECT_THAT(second.batch.sequence, ElementsAre(0, 1, 1, 1));
  EXPECT_THAT(second.batch.logit_tokens, ElementsAre(0, 3));
}

TEST_F(SchedulerTest, ASecondStepInFlightTakesItsTokensFromTheFirstsSlots) {
  scheduler_.Add(NewSequence({1}, 3));
  scheduler_.Add(NewSequence({2}, 3));
  const StepPlan first = Next();
  const StepPlan second = Next();  // the first was not collected
  EXPECT_THAT(second.batch.from_slot, ElementsAre(0, 1));
  EXPECT_THAT(second.batch.positions, ElementsAre(1, 1));
  Draw(first, 7);
  const StepPlan third = Next();
  EXPECT_THAT(third.batch.from_slot, ElementsAre(0, 1));
  Draw(second, 8);
  Draw(third, 9);
  EXPECT_EQ(Next().batch.num_tokens(), 0) << "three tokens each were asked for";
}

TEST_F(SchedulerTest, AWaitingSequenceIsTakenWhenThereArePagesForAllItMayComeTo) {
  std::shared_ptr<Sequence> large = NewSequence({1}, 97);  // 97 tokens to keep: 7 of 8 pages
  scheduler_.Add(large);
  scheduler_.Add(NewSequence({2}, 17));  // 2 pages
  scheduler_.Add(NewSequence({3}, 1));   // 1 page, but it came later
  EXPECT_THAT(Next().batch.token_ids, ElementsAre(1));
  EXPECT_EQ(scheduler_.running(), 1);
  EXPECT_EQ(scheduler_.waiting(), 2);
  EXPECT_EQ(scheduler_.waiting_tokens(), 2);
  EXPECT_EQ(cache_.used(), 7);
  scheduler_.Remove(large);
  EXPECT_TRUE(large->ended);
  EXPECT_THAT(Next().batch.token_ids, ElementsAre(2, 3));
  EXPECT_EQ(cache_.used(), 3);
}

TEST_F(SchedulerTest, ScoredTokensFollowThoseThatSample) {
  scheduler_.Add(NewScoring({1, 2, 3, 4}, 2));  // scores 3 and 4
  scheduler_.Add(NewSequence({5}, 1));
  const StepPlan plan = Next();
  EXPECT_THAT(plan.batch.token_ids, ElementsAre(1, 2, 3, 5)) << "the last scored token needs no place";
  EXPECT_THAT(plan.batch.logit_tokens, ElementsAre(3, 1, 2));
  EXPECT_EQ(plan.batch.num_sampled(), 1);
  EXPECT_THAT(plan.batch.score_targets, ElementsAre(3, 4));
}

TEST_F(SchedulerTest, PositionsMapToTheSlotsOfTheirPages) {
  std::shared_ptr<Sequence> sequence = NewSequence(std::vector<int32_t>(20, 1), 1);
  scheduler_.Add(sequence);
  std::vector<int64_t> slots;
  for (int i = 0; i < 4; ++i) {
    const StepPlan plan = Next();
    slots.insert(slots.end(), plan.batch.kv_slots.begin(), plan.batch.kv_slots.end());
    EXPECT_EQ(plan.batch.pages_per_sequence, 2);
    EXPECT_EQ(plan.batch.block_tables, sequence->pages);
  }
  ASSERT_EQ(slots.size(), 20u);
  for (int64_t p = 0; p < 20; ++p) EXPECT_EQ(slots[p], sequence->pages[p / 16] * 16 + p % 16);
}

// Random events against a plain model: every sequence gets each of its tokens computed once and in order, never more than the budget
// runs, no page is held by two, none is lost.
TEST(SchedulerModelTest, RandomLivesOfSequencesKeepTheInvariants) {
  for (const int depth : {1, 2}) {
    std::mt19937 random(depth);
    KvCache cache(40, 16);
    Scheduler scheduler({.max_batch_tokens = 24, .max_sequences = 6}, &cache);
    std::vector<std::shared_ptr<Sequence>> alive;
    std::map<const Sequence*, int64_t> computed;
    std::deque<StepPlan> in_flight;
    int64_t step = 0;
    int64_t finished = 0;
    const auto remove = [&](const std::shared_ptr<Sequence>& sequence) {
      scheduler.Remove(sequence);
      computed.erase(sequence.get());
      std::erase(alive, sequence);
    };
    const auto collect = [&] {
      const StepPlan plan = std::move(in_flight.front());
      in_flight.pop_front();
      for (const std::shared_ptr<Sequence>& sequence : plan.sampled) {
        if (sequence->ended) continue;
        sequence->tokens.push_back(1);
        const bool stops = random() % 30 == 0;
        if (stops || static_cast<int64_t>(sequence->tokens.size()) - sequence->prompt_tokens == sequence->max_draws) {
          ++finished;
          remove(sequence);
        }
      }
    };
    for (int event = 0; event < 60000; ++event) {
      if (random() % 3 == 0 && alive.size() < 12) {
        alive.push_back(NewSequence(std::vector<int32_t>(1 + random() % 60, 1), 1 + random() % 40));
        scheduler.Add(alive.back());
      }
      if (random() % 40 == 0 && !alive.empty()) remove(std::shared_ptr<Sequence>(alive[random() % alive.size()]));
      if (static_cast<int>(in_flight.size()) == depth) collect();
      StepPlan plan = scheduler.Schedule(step++, absl::Now());
      const Batch& batch = plan.batch;
      ASSERT_LE(batch.num_tokens(), 24);
      ASSERT_LE(scheduler.running(), 6);
      std::map<int64_t, int> written;
      for (int64_t slot : batch.kv_slots) ASSERT_EQ(++written[slot], 1) << "two tokens of a step write one slot";
      for (const std::shared_ptr<Sequence>& sequence : alive) {
        ASSERT_GE(sequence->planned, computed[sequence.get()]);
        ASSERT_LE(sequence->planned, sequence->most_tokens());
        computed[sequence.get()] = sequence->planned;
      }
      std::map<int32_t, int> holders;
      int64_t held = 0;
      for (const std::shared_ptr<Sequence>& sequence : alive) {
        for (int32_t page : sequence->pages) {
          ASSERT_EQ(++holders[page], 1);
          ++held;
        }
      }
      ASSERT_EQ(cache.used(), held);
      if (batch.num_tokens() > 0) in_flight.push_back(std::move(plan));
      else if (!in_flight.empty()) collect();
      else ASSERT_TRUE(alive.empty()) << "something waits and nothing runs";
    }
    EXPECT_GT(finished, 1000);
  }
}

}  // namespace
}  // namespace memserve::engine
