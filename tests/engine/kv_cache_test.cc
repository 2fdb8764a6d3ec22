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

KvCache::Chain ChainOf(const std::string& root) { return {.root = std::make_shared<const std::string>(root)}; }

TEST(KvCacheTest, FindsPagesByRootPlaceAndTokens) {
  KvCache cache(8, 2);
  std::vector<int32_t> pages, found;
  ASSERT_TRUE(cache.Allocate(2, &pages));
  KvCache::Chain chain = ChainOf("a");
  cache.Publish(pages[0], {1, 2}, &chain);
  cache.Publish(pages[1], {1, 2}, &chain);
  const std::vector<int32_t> tokens = {1, 2, 1, 2, 1, 2};
  KvCache::Chain reader = ChainOf("a");
  EXPECT_EQ(cache.TakePrefix(tokens, 3, &reader, &found), 2);
  EXPECT_EQ(found, pages);
  cache.Release(&found);
  reader = ChainOf("a");
  EXPECT_EQ(cache.TakePrefix(tokens, 1, &reader, &found), 1) << "no more than was asked for";
  cache.Release(&found);
  reader = ChainOf("b");
  EXPECT_EQ(cache.TakePrefix(tokens, 3, &reader, &found), 0) << "another root";
  reader = ChainOf("a");
  EXPECT_EQ(cache.TakePrefix(std::vector<int32_t>{2, 1, 1, 2}, 2, &reader, &found), 0) << "other tokens";
}

TEST(KvCacheTest, GivesAwayTheLeastRecentlyUsedEndsOfPrefixesFirst) {
  KvCache cache(4, 1);
  const auto keep = [&](const std::string& root) {
    std::vector<int32_t> pages;
    EXPECT_TRUE(cache.Allocate(2, &pages));
    KvCache::Chain chain = ChainOf(root);
    cache.Publish(pages[0], {1}, &chain);
    cache.Publish(pages[1], {2}, &chain);
    cache.Release(&pages);
  };
  const auto found = [&](const std::string& root) {
    std::vector<int32_t> pages;
    KvCache::Chain chain = ChainOf(root);
    const int64_t count = cache.TakePrefix(std::vector<int32_t>{1, 2}, 2, &chain, &pages);
    cache.Release(&pages);
    return count;
  };
  keep("a");
  keep("b");
  EXPECT_EQ(cache.cached(), 4);
  EXPECT_EQ(cache.used(), 0);
  EXPECT_EQ(found("a"), 2) << "and so it was used last";
  std::vector<int32_t> one;
  ASSERT_TRUE(cache.Allocate(1, &one));
  EXPECT_EQ(cache.cached(), 3);
  EXPECT_EQ(found("b"), 1) << "it lost its end";
  EXPECT_EQ(found("a"), 2);
  ASSERT_TRUE(cache.Allocate(3, &one));
  EXPECT_FALSE(cache.Allocate(1, &one));
  EXPECT_EQ(found("a") + found("b"), 0);
}

TEST(KvCacheTest, APageOfTheSameContentStaysTheOneThatIsFoundAndTheChainGoesOnFromIt) {
  KvCache cache(8, 1);
  std::vector<int32_t> first, second, found;
  ASSERT_TRUE(cache.Allocate(1, &first));
  ASSERT_TRUE(cache.Allocate(2, &second));
  KvCache::Chain a = ChainOf("x"), b = ChainOf("x"), reader = ChainOf("x");
  cache.Publish(first[0], {1}, &a);
  cache.Publish(second[0], {1}, &b);
  cache.Publish(second[1], {2}, &b);
  EXPECT_EQ(cache.TakePrefix(std::vector<int32_t>{1, 2}, 2, &reader, &found), 2);
  EXPECT_EQ(found, (std::vector<int32_t>{first[0], second[1]}));
  cache.Release(&second);
  EXPECT_EQ(cache.cached(), 0) << "the copy was not published, the other is held";
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
