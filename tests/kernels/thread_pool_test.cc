#include "kernels/cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/sync.h"

namespace memserve::kernels::cpu {
namespace {

constexpr double kMuch = 1e9;    // ns of work: worth sharing
constexpr double kLittle = 100;  // not

// A microsecond or so, in which the other threads come to take part.
void Work() {
  volatile int spin = 0;
  while (spin < 1000) spin = spin + 1;
}

TEST(ThreadPoolTest, RunsEveryTaskOnceAndSeesAllOfItsWritesWhenItReturns) {
  ThreadPool pool(4);
  for (int64_t tasks : {0, 1, 2, 3, 7, 1000}) {
    std::vector<int> runs(tasks, 0);
    pool.ParallelFor(tasks, kMuch, [&](int64_t task, int) {
      Work();
      ++runs[task];
    });
    EXPECT_THAT(runs, testing::Each(1)) << tasks << " tasks";
  }
}

TEST(ThreadPoolTest, GivesEachThreadItsOwnNumber) {
  ThreadPool pool(3);
  std::vector<std::atomic<int>> inside(pool.size());
  std::atomic<bool> shared{false};
  pool.ParallelFor(5000, kMuch, [&](int64_t, int thread) {
    ASSERT_GE(thread, 0);
    ASSERT_LT(thread, 3);
    if (++inside[thread] != 1) shared = true;
    --inside[thread];
  });
  EXPECT_FALSE(shared);
}

TEST(ThreadPoolTest, KeepsSmallWorkOnTheCallingThread) {
  ThreadPool pool(4);
  std::set<std::thread::id> threads;
  std::vector<int64_t> order;
  pool.ParallelFor(100, kLittle, [&](int64_t task, int thread) {
    EXPECT_EQ(thread, 0);
    threads.insert(std::this_thread::get_id());
    order.push_back(task);
  });
  EXPECT_THAT(threads, testing::ElementsAre(std::this_thread::get_id()));
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
}

TEST(ThreadPoolTest, SharesLargeWork) {
  ThreadPool pool(2);
  // Each task waits for the other: one thread alone would never come to an end.
  Mutex mutex;
  CondVar arrived;
  int inside = 0;
  pool.ParallelFor(2, kMuch, [&](int64_t, int) {
    MutexLock lock(mutex);
    ++inside;
    arrived.NotifyAll();
    while (inside < 2) arrived.Wait(mutex);
  });
  EXPECT_EQ(inside, 2);
}

TEST(ThreadPoolTest, ReturnsWhenTheLastTaskOfAnotherThreadIsDone) {
  ThreadPool pool(2);
  std::atomic<int> inside{0};
  bool finished = false;  // by the worker, long after the caller's own task
  pool.ParallelFor(2, kMuch, [&](int64_t, int thread) {
    ++inside;
    while (inside < 2) continue;
    for (int i = 0; thread != 0 && i < 10000; ++i) Work();
    if (thread != 0) finished = true;
  });
  EXPECT_TRUE(finished);
}

// Jobs follow each other faster than workers come back from the last one; now and then the caller works alone, long enough for the
// workers to park.
TEST(ThreadPoolTest, NeverMixesTheTasksOfTwoJobs) {
  ThreadPool pool(4);
  for (int64_t job = 0; job < 3000; ++job) {
    std::vector<int64_t> written(job % 5 + 2, -1);
    pool.ParallelFor(static_cast<int64_t>(written.size()), kMuch, [&, job](int64_t task, int) {
      Work();
      written[task] = job;
    });
    ASSERT_THAT(written, testing::Each(job));
    volatile int64_t alone = 0;
    if (job % 500 == 0) pool.ParallelFor(1000000, kLittle, [&](int64_t task, int) { alone = alone + task; });
  }
}

TEST(ThreadPoolTest, OneThreadHasNoWorkers) {
  ThreadPool pool(1);
  EXPECT_EQ(pool.size(), 1);
  int64_t sum = 0;
  pool.ParallelFor(10, kMuch, [&](int64_t task, int) { sum += task; });
  EXPECT_EQ(sum, 45);
}

}  // namespace
}  // namespace memserve::kernels::cpu
