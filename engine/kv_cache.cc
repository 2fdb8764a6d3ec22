#include "engine/kv_cache.h"

#include <algorithm>

#include "absl/hash/hash.h"
#include "kernels/check.h"

namespace memserve::engine {

KvCache::KvCache(int64_t num_pages, int64_t page_size) : page_size_(page_size), pages_(num_pages) {
  for (int64_t page = num_pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
}

bool KvCache::Allocate(int64_t count, std::vector<int32_t>* pages) {
  if (count > available()) return false;
  for (int64_t i = 0; i < count; ++i) {
    if (free_.empty()) {
      const int32_t page = oldest_;
      TakeOut(page);
      Unpublish(page);
      free_.push_back(page);
    }
    pages->push_back(free_.back());
    pages_[free_.back()].references = 1;
    free_.pop_back();
  }
  return true;
}

void KvCache::Share(const std::vector<int32_t>& pages) {
  for (int32_t page : pages) {
    MEMSERVE_CHECK(pages_[page].references > 0);
    ++pages_[page].references;
  }
}

void KvCache::Release(std::vector<int32_t>* pages) {
  // From the end: the last page of a prefix becomes the oldest, since it is of no use without those before it.
  for (auto page = pages->rbegin(); page != pages->rend(); ++page) {
    MEMSERVE_CHECK(pages_[*page].references > 0);
    if (--pages_[*page].references > 0) continue;
    if (pages_[*page].serial != 0) {
      AddNewest(*page);
    } else {
      free_.push_back(*page);
    }
  }
  pages->clear();
}

uint64_t KvCache::HashOf(const Chain& chain, absl::Span<const int32_t> tokens) const {
  return chain.last != 0 ? absl::HashOf(chain.last, tokens) : absl::HashOf(*chain.root, tokens);
}

int32_t KvCache::Find(const Chain& chain, absl::Span<const int32_t> tokens) const {
  const auto [begin, end] = published_.equal_range(HashOf(chain, tokens));
  for (auto entry = begin; entry != end; ++entry) {
    const Page& page = pages_[entry->second];
    if (page.before == chain.last && *page.root == *chain.root && absl::MakeConstSpan(page.tokens) == tokens) return entry->second;
  }
  return kNone;
}

int64_t KvCache::TakePrefix(absl::Span<const int32_t> tokens, int64_t max_pages, Chain* chain, std::vector<int32_t>* pages) {
  MEMSERVE_CHECK(chain->length == 0 && max_pages * page_size_ <= static_cast<int64_t>(tokens.size()));
  while (chain->length < max_pages) {
    const int32_t page = Find(*chain, tokens.subspan(chain->length * page_size_, page_size_));
    if (page == kNone) break;
    Hold(page);
    pages->push_back(page);
    chain->last = pages_[page].serial;
    ++chain->length;
  }
  return chain->length;
}

void KvCache::Publish(int32_t page, absl::Span<const int32_t> tokens, Chain* chain) {
  MEMSERVE_CHECK(static_cast<int64_t>(tokens.size()) == page_size_ && pages_[page].references > 0);
  ++chain->length;
  if (const int32_t other = Find(*chain, tokens); other != kNone) {
    chain->last = pages_[other].serial;
    return;
  }
  Page& added = pages_[page];
  MEMSERVE_CHECK(added.serial == 0);
  added.hash = HashOf(*chain, tokens);
  added.before = chain->last;
  added.root = chain->root;
  added.tokens.assign(tokens.begin(), tokens.end());
  added.serial = next_serial_++;
  published_.emplace(added.hash, page);
  chain->last = added.serial;
}

void KvCache::Hold(int32_t page) {
  if (pages_[page].references++ == 0) TakeOut(page);
}

void KvCache::Unpublish(int32_t page) {
  const auto [begin, end] = published_.equal_range(pages_[page].hash);
  published_.erase(std::find_if(begin, end, [&](const auto& entry) { return entry.second == page; }));
  pages_[page].serial = 0;
  pages_[page].root = nullptr;
}

void KvCache::AddNewest(int32_t page) {
  pages_[page].older = newest_;
  pages_[page].newer = kNone;
  (newest_ == kNone ? oldest_ : pages_[newest_].newer) = page;
  newest_ = page;
  ++cached_;
}

void KvCache::TakeOut(int32_t page) {
  const Page& p = pages_[page];
  (p.older == kNone ? oldest_ : pages_[p.older].newer) = p.newer;
  (p.newer == kNone ? newest_ : pages_[p.newer].older) = p.older;
  --cached_;
}

}  // namespace memserve::engine
