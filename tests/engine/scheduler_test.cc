#include "engine/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
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
  sequence->memory.knn = 8;
  return sequence;
}

std::shared_ptr<Sequence> NewScoring(std::vector<int32_t> tokens, int64_t score_begin) {
  std::shared_ptr<Sequence> sequence = NewSequence(std::move(tokens), 0);
  sequence->score_begin = score_begin;
  sequence->score_end = static_cast<int64_t>(sequence->tokens.size());
  return sequence;
}

class SchedulerTest : public ::testing::Test {
 protected:
  StepPlan Next() { return scheduler_.Schedule(step_++, absl::Now()); }
  // As the engine does when a step's results are in: the token `drawn` for every slot.
  void Draw(const StepPlan& plan, int32_t drawn) {
    for (const auto& [sequence, token, guesses] : plan.sampled) {
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

TEST_F(SchedulerTest, AWaitingSequenceIsTakenUpWhenThereArePagesForWhatIsKnownOfIt) {
  std::shared_ptr<Sequence> large = NewSequence(std::vector<int32_t>(97, 1), 1);  // 7 of 8 pages
  scheduler_.Add(large);
  scheduler_.Add(NewSequence(std::vector<int32_t>(17, 2), 1));  // 2 pages
  scheduler_.Add(NewSequence({3}, 1));                          // 1 page, but it came later
  EXPECT_EQ(Next().batch.token_ids[0], 1);
  EXPECT_EQ(scheduler_.running(), 1);
  EXPECT_EQ(scheduler_.waiting(), 2);
  EXPECT_EQ(scheduler_.waiting_tokens(), 18);
  EXPECT_EQ(cache_.used(), 7);
  scheduler_.Remove(large);
  EXPECT_TRUE(large->ended);
  EXPECT_THAT(Next().batch.token_ids, ElementsAre(3, 2, 2, 2, 2, 2)) << "the last token of a prompt goes first: it draws";
  EXPECT_EQ(cache_.used(), 3);
  EXPECT_EQ(scheduler_.waiting_tokens(), 0);
}

TEST_F(SchedulerTest, AHigherPriorityGoesFirstAndMakesRoom) {
  std::shared_ptr<Sequence> low = NewSequence(std::vector<int32_t>(100, 1), 5);  // 7 of 8 pages
  std::shared_ptr<Sequence> high = NewSequence(std::vector<int32_t>(33, 2), 5);  // 3 pages
  std::shared_ptr<Sequence> same = NewSequence(std::vector<int32_t>(33, 3), 5);
  high->priority = 1;
  scheduler_.Add(low);
  Next();
  scheduler_.Add(same);
  EXPECT_EQ(Next().batch.token_ids[0], 1) << "equal priority waits";
  scheduler_.Add(high);
  EXPECT_EQ(Next().batch.token_ids[0], 2);
  EXPECT_EQ(low->preemptions, 1);
  EXPECT_EQ(low->planned, 0);
  EXPECT_TRUE(low->pages.empty());
  EXPECT_EQ(scheduler_.preemptions(), 1);
  EXPECT_EQ(scheduler_.preempted(), 1);
  EXPECT_EQ(scheduler_.waiting(), 2) << "the older of equal priority waits before the newer: it does not fit";
}

TEST_F(SchedulerTest, PreemptsTheNewestOfTheLowestPriorityWhenPagesRunOutAndComputesItAgain) {
  std::vector<int32_t> taken;
  ASSERT_TRUE(cache_.Allocate(5, &taken));  // leaves 3 pages
  std::shared_ptr<Sequence> urgent = NewSequence(std::vector<int32_t>(15, 1), 9);
  std::shared_ptr<Sequence> plain = NewSequence(std::vector<int32_t>(14, 2), 9);
  urgent->priority = 1;
  scheduler_.Add(plain);
  scheduler_.Add(urgent);
  while (plain->draws_planned < 2 || urgent->draws_planned < 2) Draw(Next(), 7);
  EXPECT_EQ(cache_.available(), 0) << "one of them is on its second page";
  while (plain->preemptions + urgent->preemptions == 0) Draw(Next(), 7);
  EXPECT_EQ(plain->preemptions, 1) << "though it came first";
  EXPECT_EQ(plain->planned, 0);
  EXPECT_TRUE(plain->pages.empty());
  EXPECT_EQ(scheduler_.waiting(), 1);
  const std::vector<int32_t> drawn = plain->tokens;
  const int64_t draws = plain->draws_planned;
  EXPECT_EQ(static_cast<int64_t>(drawn.size()), 14 + draws) << "what was drawn stays drawn";

  cache_.Release(&taken);
  std::vector<int32_t> positions;
  while (plain->draws_planned == draws) {
    const StepPlan plan = Next();
    for (int64_t t = 0; t < plan.batch.num_tokens(); ++t) {
      const int32_t page = plan.batch.block_tables[plan.batch.sequence[t] * plan.batch.pages_per_sequence];
      if (page != plain->pages.at(0)) continue;
      positions.push_back(plan.batch.positions[t]);
      EXPECT_EQ(plan.batch.token_ids[t], drawn[positions.back()]);
    }
    Draw(plan, 7);
  }
  EXPECT_EQ(positions.size(), drawn.size()) << "each of its tokens is computed once more";
}

TEST_F(SchedulerTest, APrefixOfTheSameRootIsTakenFromTheCacheButForTheLastToken) {
  const auto root = std::make_shared<const std::string>("tenant a");
  const std::vector<int32_t> prompt(32, 5);
  const auto add = [&](std::shared_ptr<const std::string> of, std::vector<int32_t> tokens) {
    std::shared_ptr<Sequence> sequence = NewSequence(std::move(tokens), 2);
    sequence->chain.root = std::move(of);
    scheduler_.Add(sequence);
    return sequence;
  };
  std::shared_ptr<Sequence> first = add(root, prompt);
  for (int i = 0; i < 6; ++i) Draw(Next(), 9);
  scheduler_.Remove(first);
  EXPECT_EQ(cache_.used(), 0);
  EXPECT_EQ(cache_.cached(), 2);
  std::shared_ptr<Sequence> again = add(root, prompt);
  EXPECT_EQ(Next().batch.positions.front(), 16) << "a page of 16, and the last 16 tokens are computed: one of them draws";
  EXPECT_EQ(again->cached_tokens, 16);
  std::shared_ptr<Sequence> longer = add(std::make_shared<const std::string>("tenant a"), std::vector<int32_t>(40, 5));
  Next();
  EXPECT_EQ(longer->cached_tokens, 32);
  EXPECT_EQ(longer->pages[0], again->pages[0]) << "one page, two holders";
  std::shared_ptr<Sequence> other = add(std::make_shared<const std::string>("tenant b"), prompt);
  while (other->planned == 0) Draw(Next(), 9);
  EXPECT_EQ(other->cached_tokens, 0);
}

TEST_F(SchedulerTest, FollowersWaitForTheirLeadersPromptAndShareItsPages) {
  const auto root = std::make_shared<const std::string>("one request");
  std::shared_ptr<Sequence> leader = NewSequence(std::vector<int32_t>(33, 5), 2), follower = NewSequence(std::vector<int32_t>(33, 5), 2);
  leader->chain.root = follower->chain.root = root;
  follower->leader = leader;
  scheduler_.Add(leader);
  scheduler_.Add(follower);
  for (int i = 0; i < 5; ++i) Next();
  EXPECT_EQ(scheduler_.running(), 1);
  Next();
  Next();
  EXPECT_EQ(scheduler_.running(), 2);
  EXPECT_EQ(follower->cached_tokens, 32);
  EXPECT_EQ(follower->pages[1], leader->pages[1]);
  EXPECT_NE(follower->pages[2], leader->pages[2]);
  EXPECT_EQ(cache_.used(), 4);
}

TEST_F(SchedulerTest, PromptsTakeNoMoreThanTheirLimitBesideDecodes) {
  scheduler_.Add(NewSequence({1, 2}, 5));
  scheduler_.Add(NewSequence({3, 4, 5, 6, 7, 8, 9}, 5));
  const StepTimes times(absl::ZeroDuration(), absl::Milliseconds(1), absl::ZeroDuration());  // 1.5 tokens beside one
  Draw(scheduler_.Schedule(0, absl::Now(), times), 50);
  const StepPlan plan = scheduler_.Schedule(1, absl::Now(), times);
  EXPECT_THAT(plan.batch.token_ids, ElementsAre(50, 7)) << "6 were taken where nothing decoded";
  EXPECT_EQ(plan.work.tokens, 2);
  EXPECT_EQ(plan.work.keys, 3 + 5);
}

TEST_F(SchedulerTest, ScoredTokensFollowThoseThatSample) {
  scheduler_.Add(NewScoring({1, 2, 3, 4}, 2));  // scores 3 and 4
  scheduler_.Add(NewSequence({5}, 1));
  const StepPlan plan = Next();
  EXPECT_THAT(plan.batch.token_ids, ElementsAre(5, 1, 2, 3)) << "the last scored token needs no place";
  EXPECT_THAT(plan.batch.logit_tokens, ElementsAre(0, 2, 3));
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

// Random events against a plain model. Whatever arrives, is preempted, shares a prefix, is cancelled or ends: a sequence's tokens are
// computed in order, never more than the budget runs, no page is written by two or read before it is written, what is held is what the
// sequences list, none is lost, and nobody starves.
void RunModel(int seed, int events) {
  for (const int depth : {1, 2}) {
    std::mt19937 random(seed + depth);
    constexpr int64_t kPages = 24, kPageSize = 16;
    KvCache cache(kPages, kPageSize);
    Scheduler scheduler({.max_batch_tokens = 24, .max_sequences = 6}, &cache);
    const std::shared_ptr<const std::string> roots[] = {nullptr, std::make_shared<const std::string>("a"),
                                                        std::make_shared<const std::string>("b")};
    std::vector<std::shared_ptr<Sequence>> alive;
    std::deque<StepPlan> in_flight;
    // What each slot of the cache holds: root, and the tokens up to there, as a string.
    std::vector<std::string> held_by_slot(kPages * kPageSize);
    int64_t step = 0, finished = 0, hits = 0, preempted = 0, scored = 0, guessed = 0, forks = 0;
    const auto remove = [&](std::shared_ptr<Sequence> sequence) {
      scheduler.Remove(sequence);
      std::erase(alive, sequence);
    };
    const auto collect = [&] {
      const StepPlan plan = std::move(in_flight.front());
      in_flight.pop_front();
      for (const StepPlan::Draw& draw : plan.sampled) {
        const std::shared_ptr<Sequence>& sequence = draw.sequence;
        if (!draw.counts()) continue;
        guessed += draw.guesses > 0;
        sequence->Append(static_cast<int32_t>(random() % 4 == 0));
        if (random() % 30 == 0 || static_cast<int64_t>(sequence->tokens.size()) - sequence->prompt_tokens == sequence->max_draws) {
          ++finished;
          preempted += sequence->preemptions;
          remove(sequence);
        }
      }
      for (const StepPlan::Draw& draw : plan.sampled) {
        if (draw.guesses == 0 && !draw.sequence->guessed.empty()) draw.sequence->TakeBackGuesses();
      }
      for (const std::shared_ptr<Sequence>& sequence : plan.scored) {
        if (sequence->ended) continue;
        ++scored;
        if (!sequence->scores()) continue;
        if (++sequence->max_draws == static_cast<int64_t>(sequence->tokens.size()) - sequence->score_begin) {
          ++finished;
          remove(sequence);
        }
      }
    };
    int64_t idle = 0;
    for (int event = 0; event < events; ++event) {
      if (random() % 3 == 0 && alive.size() < 12) {
        // Few different tokens and prompts: many prefixes are alike.
        const bool scores = random() % 5 == 0;
        std::vector<int32_t> tokens(2 + random() % 100, static_cast<int32_t>(random() % 2));
        const auto begin = 1 + static_cast<int64_t>(random() % (tokens.size() - 1));
        alive.push_back(scores ? NewScoring(std::move(tokens), begin) : NewSequence(std::move(tokens), 1 + random() % 120));
        Sequence& added = *alive.back();
        added.priority = random() % 8 == 0 ? 1 : 0;
        added.chain.root = roots[random() % 3];
        if (random() % 3 == 0) added.drafts = Drafts(SpeculationParams{.max_draft_tokens = 5, .min_ngram = 1});
        if (!scores && random() % 8 == 0) {  // a prompt whose tokens are scored too
          added.score_begin = 1;
          added.score_end = added.prompt_tokens;
          added.prompt_top_logprobs = 0;
        }
        if (alive.size() > 1 && random() % 4 == 0 && added.priority == 0) added.leader = alive[random() % (alive.size() - 1)];
        scheduler.Add(alive.back());
        // Choices of one request.
        for (int choice = 1; !scores && random() % 2 == 0; ++choice) {
          alive.push_back(NewSequence({added.tokens.begin(), added.tokens.end()}, added.max_draws));
          alive.back()->leader = *(alive.end() - 1 - choice);
          alive.back()->chain.root = added.chain.root;
          alive.back()->priority = added.priority;
          scheduler.Add(alive.back());
        }
      }
      if (random() % 40 == 0 && !alive.empty()) remove(alive[random() % alive.size()]);
      if (static_cast<int>(in_flight.size()) == depth) collect();
      StepPlan plan = scheduler.Schedule(
          step++, absl::Now(), StepTimes(absl::Seconds(1), absl::Seconds(1.5) / (1 + random() % 30), absl::ZeroDuration()));
      const Batch& batch = plan.batch;
      ASSERT_LE(batch.num_tokens(), 24);
      ASSERT_LE(scheduler.running(), 6);
      for (size_t i = 0; i < batch.page_copies.size(); i += 2) {
        ++forks;
        std::copy_n(held_by_slot.begin() + batch.page_copies[i] * kPageSize, kPageSize,
                    held_by_slot.begin() + batch.page_copies[i + 1] * kPageSize);
      }
      std::map<int64_t, int> written;
      for (int64_t slot : batch.kv_slots) ASSERT_EQ(++written[slot], 1) << "two tokens of a step write one slot";
      // Tokens drawn by a step in flight are not known; a unique name stands for them.
      std::map<int32_t, int64_t> holders;
      for (const std::shared_ptr<Sequence>& sequence : alive) {
        for (int32_t page : sequence->pages) ++holders[page];
        hits += sequence->cached_tokens > 0 && sequence->planned == sequence->cached_tokens;
        ASSERT_LE(sequence->planned, sequence->most_tokens());
        ASSERT_LE(cache.PagesFor(sequence->planned), static_cast<int64_t>(sequence->pages.size()));
      }
      ASSERT_EQ(cache.used(), static_cast<int64_t>(holders.size()));
      ASSERT_LE(cache.used() + cache.cached(), kPages);
      // Each token finds behind it, in the pages of its block table, just the tokens of its own sequence.
      for (int64_t t = 0; t < batch.num_tokens(); ++t) {
        const int64_t position = batch.positions[t];
        const int32_t* table = batch.block_tables.data() + batch.sequence[t] * batch.pages_per_sequence;
        ASSERT_EQ(batch.kv_slots[t], table[position / kPageSize] * kPageSize + position % kPageSize);
        const std::string before = position == 0 ? "" : held_by_slot[table[(position - 1) / kPageSize] * kPageSize + (position - 1) % kPageSize];
        ASSERT_EQ(static_cast<int64_t>(before.size()), position) << "what stands before was not computed";
        held_by_slot[batch.kv_slots[t]] = before + (batch.from_slot[t] >= 0 ? '?' : static_cast<char>('0' + batch.token_ids[t]));
      }
      for (const std::shared_ptr<Sequence>& sequence : alive) {
        if (sequence->planned == 0) continue;
        const int64_t last = sequence->planned - 1;
        const std::string& held = held_by_slot[sequence->pages[last / kPageSize] * kPageSize + last % kPageSize];
        ASSERT_EQ(static_cast<int64_t>(held.size()), sequence->planned);
        for (int64_t i = 0; i < sequence->planned && i < static_cast<int64_t>(sequence->tokens.size()); ++i) {
          ASSERT_TRUE(held[i] == '?' || held[i] == '0' + sequence->tokens[i]) << "the pages hold another prefix";
        }
      }
      if (batch.num_tokens() > 0) {
        in_flight.push_back(std::move(plan));
        idle = 0;
      } else if (!in_flight.empty()) {
        collect();
      } else {
        ASSERT_TRUE(alive.empty() || ++idle < 3) << "something waits and nothing runs";
      }
    }
    EXPECT_GT(finished, 1000);
    EXPECT_GT(hits, 100);
    EXPECT_GT(preempted, 100);
    EXPECT_GT(scored, 1000);
    EXPECT_GT(guessed, 1000);
    EXPECT_GT(forks, 100);
    while (!alive.empty()) remove(alive.back());
    EXPECT_EQ(cache.used(), 0);
    EXPECT_EQ(scheduler.waiting_tokens(), 0);
    EXPECT_EQ(scheduler.preempted(), 0);
  }
}

TEST(SchedulerModelTest, RandomLivesOfSequencesKeepTheInvariants) { RunModel(0, 60000); }
TEST(SchedulerModelLongTest, MillionsOfEventsKeepThem) { RunModel(10, 2000000); }

}  // namespace
}  // namespace memserve::engine
