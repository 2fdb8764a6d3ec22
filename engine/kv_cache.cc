#include "engine/kv_cache.h"

#include "kernels/check.h"

namespace memserve::engine {

KvCache::KvCache(int64_t num_pages, int64_t page_size) : page_size_(page_size), references_(num_pages, 0) {
  for (int64_t page = num_pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
}

bool KvCache::Allocate(int64_t count, std::vector<int32_t>* pages) {
  if (count > static_cast<int64_t>(free_.size())) return false;
  for (int64_t i = 0; i < count; ++i) {
    pages->push_back(free_.back());
    references_[free_.back()] = 1;
    free_.pop_back();
  }
  return true;
}

void KvCache::Share(const std::vector<int32_t>& pages) {
  for (int32_t page : pages) {
    MEMSERVE_CHECK(references_[page] > 0);
    ++references_[page];
  }
}

void KvCache::Release(std::vector<int32_t>* pages) {
  for (int32_t page : *pages) {
    MEMSERVE_CHECK(references_[page] > 0);
    if (--references_[page] == 0) free_.push_back(page);
  }
  pages->clear();
}

}  // namespace memserve::engine
