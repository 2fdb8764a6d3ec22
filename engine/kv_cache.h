// The pages of the KV cache: who holds which, and what is kept of those that nobody holds. Engine thread only.
//
// A page is held (reference-counted, so that sequences can share a prefix), cached (nobody holds it, but its tokens are known and a
// later sequence may take it up again), or free. Full pages are published under what they hold: the root of their chain (what else the
// keys and values depend on, and whose they are), the page before them, and their tokens; all of it is compared on a hit, so that a
// collision of hashes can never mix two prefixes. Cached pages are given away least recently used first, the end of a prefix before
// its beginning.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/types/span.h"

namespace memserve::engine {

class KvCache {
 public:
  KvCache(int64_t num_pages, int64_t page_size);

  // `count` pages with one reference each, or none at all (false) where fewer are free or cached. Appends them to `pages`.
  bool Allocate(int64_t count, std::vector<int32_t>* pages);
  // One more holder for each page: a fork.
  void Share(const std::vector<int32_t>& pages);
  // One holder less for each page, and empties `pages`. Pages without a holder may be reused within the same step.
  void Release(std::vector<int32_t>* pages);

  // Where a sequence stands in its chain of published pages.
  struct Chain {
    std::shared_ptr<const std::string> root;
    int64_t last = 0;     // the published page before, by its serial number; 0: none
    int64_t length = 0;   // pages
  };

  // Takes the published pages that `tokens` begins with, at most `max_pages`: holds them, appends them to `pages`, moves `chain` on.
  // Returns how many. `chain` is at its beginning.
  int64_t TakePrefix(absl::Span<const int32_t> tokens, int64_t max_pages, Chain* chain, std::vector<int32_t>* pages);
  // `page` holds the next page_size tokens of the chain: from now on others may find it. A page of the same content that is already
  // published stays the one that is found.
  void Publish(int32_t page, absl::Span<const int32_t> tokens, Chain* chain);

  int64_t PagesFor(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
  int64_t page_size() const { return page_size_; }
  int64_t total() const { return static_cast<int64_t>(pages_.size()); }
  int64_t used() const { return total() - available(); }                          // held
  int64_t cached() const { return cached_; }                                      // not held, tokens known
  int64_t available() const { return static_cast<int64_t>(free_.size()) + cached_; }  // what Allocate can give

 private:
  static constexpr int32_t kNone = -1;

  struct Page {
    int32_t references = 0;
    // If published:
    int64_t serial = 0;  // 0: not published
    int64_t before = 0;
    std::shared_ptr<const std::string> root;
    std::vector<int32_t> tokens;
    uint64_t hash = 0;
    // If cached, its neighbours in the order of use.
    int32_t older = kNone, newer = kNone;
  };

  uint64_t HashOf(const Chain& chain, absl::Span<const int32_t> tokens) const;
  int32_t Find(const Chain& chain, absl::Span<const int32_t> tokens) const;
  void Hold(int32_t page);
  void Unpublish(int32_t page);
  void AddNewest(int32_t page);
  void TakeOut(int32_t page);

  const int64_t page_size_;
  std::vector<Page> pages_;
  std::vector<int32_t> free_;  // the last one is taken first
  std::unordered_multimap<uint64_t, int32_t> published_;
  int64_t next_serial_ = 1;
  int64_t cached_ = 0;
  int32_t oldest_ = kNone, newest_ = kNone;
};

}  // namespace memserve::engine
