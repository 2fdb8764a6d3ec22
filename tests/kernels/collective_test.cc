#include "kernels/collective.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <numeric>
#include <thread>

namespace memserve::kernels {
namespace {

// Runs one thread for each rank.
void OnEveryRank(std::vector<std::unique_ptr<Collective>>& collectives, const std::function<void(Collective&)>& body) {
  std::vector<std::thread> threads;
  for (auto& collective : collectives) threads.emplace_back([&body, &collective] { body(*collective); });
  for (std::thread& thread : threads) thread.join();
}

class CollectiveTest : public testing::TestWithParam<int> {
 protected:
  int size() { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, CollectiveTest, testing::Values(1, 2, 3));

TEST_P(CollectiveTest, KnowsItsPlace) {
  const auto collectives = NewInMemoryCollectives(size());
  ASSERT_EQ(collectives.size(), static_cast<size_t>(size()));
  for (int r = 0; r < size(); ++r) {
    EXPECT_EQ(collectives[r]->rank(), r);
    EXPECT_EQ(collectives[r]->size(), size());
  }
}

TEST_P(CollectiveTest, AddsElementByElementAgainAndAgain) {
  auto collectives = NewInMemoryCollectives(size());
  OnEveryRank(collectives, [this](Collective& collective) {
    for (int round = 0; round < 200; ++round) {
      for (int64_t rows : {0, 1, 3}) {
        std::vector<float> data(rows * 5);
        for (size_t i = 0; i < data.size(); ++i) data[i] = 100 * collective.rank() + static_cast<float>(i) + round;
        collective.AllReduce({data.data(), {rows, 5}});
        for (size_t i = 0; i < data.size(); ++i) {
          ASSERT_EQ(data[i], 100 * size() * (size() - 1) / 2 + size() * (static_cast<float>(i) + round)) << "element " << i;
        }
      }
    }
  });
}

TEST(AllReduceTest, AddsInRankOrder) {
  // 1 is lost beside 2^30: (2^30 + 1) − 2^30 = 0, and 2^30 − 2^30 + 1 = 1.
  for (const auto& [in, sum] : {std::pair<std::array<float, 3>, float>{{0x1p30f, 1, -0x1p30f}, 0}, {{0x1p30f, -0x1p30f, 1}, 1}}) {
    auto collectives = NewInMemoryCollectives(3);
    OnEveryRank(collectives, [&in = in, &sum = sum](Collective& collective) {
      std::vector<float> data(7, in[collective.rank()]);
      collective.AllReduce({data.data(), {1, 7}});
      EXPECT_THAT(data, testing::Each(sum)) << "rank " << collective.rank();
    });
  }
}

TEST_P(CollectiveTest, PutsUnevenColumnsOneAfterTheOther) {
  auto collectives = NewInMemoryCollectives(size());
  OnEveryRank(collectives, [this](Collective& collective) {
    for (int64_t rows : {0, 1, 4}) {
      std::vector<int64_t> widths;
      std::vector<float> expected;
      for (int r = 0; r < size(); ++r) widths.push_back(r == 1 ? 0 : 2 + r);
      for (int64_t t = 0; t < rows; ++t) {
        for (int r = 0; r < size(); ++r) {
          for (int64_t i = 0; i < widths[r]; ++i) expected.push_back(t * 100 + r * 10 + i);
        }
      }
      const int64_t width = widths[collective.rank()];
      std::vector<float> local;
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t i = 0; i < width; ++i) local.push_back(t * 100 + collective.rank() * 10 + i);
      }
      std::vector<float> out(expected.size(), -1);
      const int64_t total =
          rows > 0 ? static_cast<int64_t>(expected.size()) / rows : std::accumulate(widths.begin(), widths.end(), int64_t{0});
      collective.AllGather(TensorView<float, 2>(local.data(), {rows, width}), widths, {out.data(), {rows, total}});
      EXPECT_EQ(out, expected);
    }
  });
}

TEST(CollectiveAbortTest, WakesRanksThatWaitAndLetsLaterCallsReturnAtOnce) {
  auto collectives = NewInMemoryCollectives(3);
  std::vector<float> data(4);
  std::thread first([&] {
    std::vector<float> mine(4);
    collectives[0]->AllReduce({mine.data(), {1, 4}});  // rank 2 never comes
  });
  std::thread second([&] {
    std::vector<float> mine(4), out(12);
    collectives[1]->AllGather(TensorView<float, 2>(mine.data(), {1, 4}), std::vector<int64_t>{4, 4, 4}, {out.data(), {1, 12}});
  });
  collectives[2]->Abort();
  first.join();
  second.join();
  for (auto& collective : collectives) collective->AllReduce({data.data(), {1, 4}});
  collectives[1]->Abort();  // again does no harm
}

// Whoever aborts, no rank hangs and none reads what another has freed (the sanitizers watch).
TEST(CollectiveAbortTest, MayComeAtAnyMoment) {
  for (int attempt = 0; attempt < 50; ++attempt) {
    auto collectives = NewInMemoryCollectives(2);
    std::thread other([&] { collectives[attempt % 2]->Abort(); });
    OnEveryRank(collectives, [](Collective& collective) {
      for (int round = 0; round < 20; ++round) {
        std::vector<float> data(100, 1);
        collective.AllReduce({data.data(), {1, 100}});
      }
    });
    other.join();
  }
}

}  // namespace
}  // namespace memserve::kernels
