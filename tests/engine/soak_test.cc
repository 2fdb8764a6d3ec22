// Thousands of streams at once from several threads, a third of them cancelled at random, a tenth wrong in some way. What ends as
// it should is what it would be alone, and nothing is left behind.

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "engine/engine.h"
#include "engine/start_report.h"
#include "tests/support/collector.h"
#include "tests/support/engines.h"
#include "tests/support/golden.h"

namespace memserve::engine {
namespace {

using memserve::testing::GenerateChoices;
using memserve::testing::Generated;
using memserve::testing::GoldenCase;
using memserve::testing::LoadGolden;
using memserve::testing::ParityOptions;

// Requests of all kinds, short enough that thousands of them take seconds.
std::vector<GenerateRequest> Kinds(const GoldenCase& golden) {
  std::vector<GenerateRequest> kinds;
  for (int i = 0; i < 48; ++i) {
    const std::vector<int32_t>& tokens = golden.sequences[i % golden.sequences.size()].tokens;
    GenerateRequest request;
    request.prompt = std::vector<int32_t>(tokens.begin(), tokens.begin() + 1 + i * 5 % static_cast<int>(tokens.size()));
    request.stop = {.max_tokens = 1 + i * 7 % 40, .ignore_eos = true};
    request.logprobs = true;
    if (i % 3 != 0) request.sampling = {.temperature = 0.8f, .seed = static_cast<uint64_t>(i)};
    if (i % 4 == 1) request.sampling.repetition_penalty = 1.2f;
    if (i % 5 == 2) request.n = 1 + i % 4;
    if (i % 6 == 3) request.speculation = SpeculationParams{.min_ngram = 1};
    if (i % 7 == 4) request.prompt_logprobs = 2;
    if (i % 8 == 5) request.memory.enabled = false;
    if (i % 9 == 6) request.sampling.allowed_token_ids = {70, 71, 72};
    if (i % 10 == 7) request.stop.strings = {"a", "th"};
    if (i % 11 == 8) request.memory = {.knn = 3, .masked_rows = {1, 5, 7}};
    if (i % 12 == 9) request.scheduling.priority = 1;
    if (i % 13 == 10) request.scheduling.prefix_cache = false;
    kinds.push_back(std::move(request));
  }
  return kinds;
}

GenerateRequest MakeWrong(GenerateRequest request, int way) {
  switch (way % 8) {
    case 0:
      request.prompt = std::vector<int32_t>{1, 1 << 30};
      break;
    case 1:
      request.sampling.temperature = -1;
      break;
    case 2:
      request.stop.strings.assign(100, "x");
      break;
    case 3:
      request.prompt = std::vector<int32_t>(100000, 5);
      break;
    case 4:
      request.n = -3;
      break;
    case 5:
      request.deadline = absl::Now() + absl::Microseconds(way);
      break;
    case 6:
      request.memory.masked_rows = {1 << 30};
      break;
    case 7:
      request.prompt = std::vector<int32_t>{};
      break;
  }
  return request;
}

// Counts down; the threads that submit wait while too many are on their way.
class Gate {
 public:
  explicit Gate(int most) : free_(most) {}
  void Enter() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return free_ > 0; });
    --free_;
  }
  void Leave() {
    // Under the lock: who waits may destroy the gate as soon as he sees it.
    const std::lock_guard lock(mutex_);
    ++free_;
    changed_.notify_all();
  }
  void WaitForAll(int most) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return free_ == most; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int free_;
};

// What became of all streams.
struct Tally {
  std::atomic<int> equal{0}, different{0}, cancelled{0}, refused{0}, late{0}, other{0};
};

// Compares what it hears with what is expected; cancels itself after some deltas.
class SoakListener final : public GenerateListener {
 public:
  SoakListener(Engine& engine, Gate& gate, Tally& tally, std::string id, const std::vector<Generated>* expected, int cancel_after)
      : engine_(engine), gate_(gate), tally_(tally), id_(std::move(id)), expected_(expected), cancel_after_(cancel_after) {}

  void OnDelta(Delta delta) override {
    if (heard_.size() <= static_cast<size_t>(delta.choice)) heard_.resize(delta.choice + 1);
    Generated& heard = heard_[delta.choice];
    heard.text += delta.text;
    heard.token_ids.insert(heard.token_ids.end(), delta.token_ids.begin(), delta.token_ids.end());
    heard.logprobs.insert(heard.logprobs.end(), delta.logprobs.begin(), delta.logprobs.end());
    if (++deltas_ == cancel_after_) engine_.Cancel(id_);
  }
  void OnFinished(absl::StatusOr<Finished> finished) override {
    if (finished.ok()) {
      if (heard_.size() <= static_cast<size_t>(finished->choice)) heard_.resize(finished->choice + 1);
      Generated& heard = heard_[finished->choice];
      heard.text += finished->text;
      const bool last = finished->last;
      heard.finished = std::move(finished);
      if (!last) return;
      ++(expected_ != nullptr && heard_ == *expected_ ? tally_.equal : tally_.different);
    } else {
      switch (finished.status().code()) {
        case absl::StatusCode::kCancelled:
          ++tally_.cancelled;
          break;
        case absl::StatusCode::kInvalidArgument:
          ++tally_.refused;
          break;
        case absl::StatusCode::kDeadlineExceeded:
          ++tally_.late;
          break;
        default:
          ++tally_.other;
      }
    }
    gate_.Leave();
  }

 private:
  Engine& engine_;
  Gate& gate_;
  Tally& tally_;
  const std::string id_;
  const std::vector<Generated>* expected_;  // null: it must fail
  const int cancel_after_;                  // 0: never
  std::vector<Generated> heard_;
  int deltas_ = 0;
};

void Soak(int streams) {
  constexpr int kAtOnce = 96, kThreads = 4;
  const GoldenCase golden = LoadGolden("A");
  EngineOptions options = ParityOptions(golden.checkpoint);
  const std::vector<GenerateRequest> kinds = Kinds(golden);
  std::vector<std::vector<Generated>> solo;
  {
    const std::unique_ptr<Engine> alone = *Engine::Create(options);
    for (const GenerateRequest& request : kinds) {
      solo.push_back(GenerateChoices(*alone, request));
      for (const Generated& choice : solo.back()) ASSERT_TRUE(choice.finished.ok()) << choice.finished.status();
    }
  }
  // Few pages and sequences: all of preemption, queueing and eviction happens.
  options.kv_cache_bytes = 1 << 20;
  options.max_sequences = 24;
  options.max_batch_tokens = 64;
  const std::unique_ptr<Engine> engine = *Engine::Create(options);
  Tally tally;
  Gate gate(kAtOnce);
  std::atomic<int> next{0};
  std::atomic<int64_t> resident_early{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = next++; i < streams; i = next++) {
        if (i == streams / 4) resident_early = ResidentBytes("VmRSS") / 1024;
        gate.Enter();
        const size_t kind = random() % kinds.size();
        GenerateRequest request = kinds[kind];
        request.id = "soak-" + std::to_string(i);
        const bool wrong = random() % 10 == 0, cancelled = random() % 3 == 0;
        if (wrong) request = MakeWrong(std::move(request), static_cast<int>(random() % 1000));
        const int cancel_after = cancelled ? 1 + static_cast<int>(random() % 20) : 0;
        const std::string id = request.id;
        engine->Generate(request,
                         std::make_shared<SoakListener>(*engine, gate, tally, id, wrong ? nullptr : &solo[kind], cancel_after));
        if (cancelled && random() % 2 == 0) engine->Cancel(id);  // queued, being tokenised, or in its first step
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  gate.WaitForAll(kAtOnce);
  EXPECT_EQ(tally.different, 0) << "finished, and not as alone (or what was wrong was not refused)";
  EXPECT_EQ(tally.other, 0);
  EXPECT_EQ(tally.equal + tally.cancelled + tally.refused + tally.late, streams);
  EXPECT_GT(tally.equal, streams / 2);
  EXPECT_GT(tally.cancelled, streams / 10);
  EXPECT_GT(tally.refused, streams / 25);
  memserve::testing::ExpectNoPagesLeft(*engine);
  const Load load = engine->load();
  EXPECT_EQ(load.requests + load.preempted, 0);
  EXPECT_EQ(load.waiting_tokens, 0);
  EXPECT_GT(load.preemptions, 0);
  EXPECT_GT(load.cached_tokens, 0);
  const int64_t growth = ResidentBytes("VmRSS") / 1024 - resident_early;
  ::testing::Test::RecordProperty("growth_kib", static_cast<int>(growth));
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // these keep what was freed for a while
  EXPECT_LT(growth, 8 << 10) << "KiB since a quarter of the streams";
#endif
  std::printf("%d streams: %d equal to their solo run, %d cancelled, %d refused, %d late; %ld preemptions, %ld KiB grown\n",
              streams, tally.equal.load(), tally.cancelled.load(), tally.refused.load(), tally.late.load(),
              static_cast<long>(load.preemptions), static_cast<long>(growth));
}

TEST(SoakTest, AThousandStreamsLeaveNothingBehind) { Soak(1000); }
TEST(SoakLongTest, TenThousandStreamsLeaveNothingBehind) { Soak(10000); }

}  // namespace
}  // namespace memserve::engine
