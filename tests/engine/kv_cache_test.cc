#include "engine/kv_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

namespace memserve::engine {
namespace {

TEST(KvCacheTest, AllocatesAllOrNothing) {
  KvCache cache(3, 16);
  std::vector<int32_t> pages;
  EXPECT_FALSE(cache.Allocate(4, &pages));
  EXPECT_TRUE(pages.empty());
  EXPECT_EQ(cache.used(), 0);
  EXPECT_TRUE(cache.Allocate(3, &pages));
  EXPECT_EQ(std::set<int32_t>(pages.begin(), pages.end()), (std::set<int32_t>{0, 1, 2}));
  EXPECT_EQ(cache.used(), 3);
  EXPECT_TRUE(cache.Allocate(0, &pages));
  cache.Release(&pages);
  EXPECT_TRUE(pages.empty());
  EXPECT_EQ(cache.used(), 0);
}

TEST(KvCacheTest, ASharedPageIsFreeWhenItsLastHolderLetsGo) {
  KvCache cache(2, 16);
  std::vector<int32_t> first;
  ASSERT_TRUE(cache.Allocate(2, &first));
  std::vector<int32_t> second = first;
  cache.Share(second);
  cache.Release(&first);
  EXPECT_EQ(cache.used(), 2);
  cache.Release(&second);
  EXPECT_EQ(cache.used(), 0);
}

TEST(KvCacheTest, PagesForRoundsUp) {
  const KvCache cache(1, 16);
  EXPECT_EQ(cache.PagesFor(0), 0);
  EXPECT_EQ(cache.PagesFor(1), 1);
  EXPECT_EQ(cache.PagesFor(16), 1);
  EXPECT_EQ(cache.PagesFor(17), 2);
}

// A plain model of the reference counts beside the cache, over random events.
TEST(KvCacheTest, CountsAgreeWithAPlainModelOverRandomEvents) {
  constexpr int64_t kPages = 50;
  KvCache cache(kPages, 16);
  std::mt19937 random(7);
  std::vector<std::vector<int32_t>> holders;
  for (int event = 0; event < 200000; ++event) {
    const uint32_t kind = random() % 3;
    if (kind == 0) {
      std::vector<int32_t> pages;
      const int64_t count = random() % 12;
      const bool fits = count <= kPages - cache.used();
      ASSERT_EQ(cache.Allocate(count, &pages), fits);
      if (fits) holders.push_back(pages);
    } else if (kind == 1 && !holders.empty()) {
      holders.push_back(holders[random() % holders.size()]);
      cache.Share(holders.back());
    } else if (!holders.empty()) {
      std::swap(holders[random() % holders.size()], holders.back());
      cache.Release(&holders.back());
      holders.pop_back();
    }
    if (holders.size() > 30) {
      cache.Release(&holders.front());
      holders.erase(holders.begin());
    }
    std::set<int32_t> held;
    for (const auto& pages : holders) held.insert(pages.begin(), pages.end());
    ASSERT_EQ(cache.used(), static_cast<int64_t>(held.size())) << "after event " << event;
  }
}

}  // namespace
}  // namespace memserve::engine
