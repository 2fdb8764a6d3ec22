// The pages of the KV cache: who holds which. Engine thread only. Pages are reference-counted, so that sequences can share a prefix.
#pragma once

#include <cstdint>
#include <vector>

namespace memserve::engine {

class KvCache {
 public:
  KvCache(int64_t num_pages, int64_t page_size);

  // `count` pages with one reference each, or none at all (false) where fewer are free. Appends them to `pages`.
  bool Allocate(int64_t count, std::vector<int32_t>* pages);
  // One more holder for each page: a fork.
  void Share(const std::vector<int32_t>& pages);
  // One holder less for each page, and empties `pages`. Pages without a holder may be reused within the same step.
  void Release(std::vector<int32_t>* pages);

  int64_t PagesFor(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
  int64_t page_size() const { return page_size_; }
  int64_t total() const { return static_cast<int64_t>(references_.size()); }
  int64_t used() const { return total() - static_cast<int64_t>(free_.size()); }

 private:
  const int64_t page_size_;
  std::vector<int32_t> references_;  // of each page
  std::vector<int32_t> free_;        // the last one is taken first
};

}  // namespace memserve::engine
