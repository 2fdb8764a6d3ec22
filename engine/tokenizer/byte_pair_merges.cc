#include "engine/tokenizer/byte_pair_merges.h"

#include <algorithm>
#include <queue>

namespace memserve::engine {
namespace {

// Up to here a scan over all pairs for each join is faster than a heap.
constexpr size_t kShort = 48;
constexpr int32_t kNoRank = INT32_MAX;

}  // namespace

void BytePairMerges::Apply(std::vector<int32_t>& symbols, std::vector<int32_t>& ids) const {
  if (symbols.size() > kShort) {
    ApplyToLong(symbols);
  } else if (symbols.size() > 1) {
    Pair next[kShort];  // of symbols i and i + 1
    size_t count = symbols.size();
    const auto look_up = [&](size_t i) {
      const Pair* found = i + 1 < count ? Find(symbols[i], symbols[i + 1]) : nullptr;
      next[i] = found == nullptr ? Pair{kNoRank, 0} : *found;
    };
    for (size_t i = 0; i < count; ++i) look_up(i);
    while (count > 1) {
      size_t best = 0;
      for (size_t i = 1; i + 1 < count; ++i) {
        if (next[i].rank < next[best].rank) best = i;
      }
      if (next[best].rank == kNoRank) break;
      symbols[best] = next[best].joined;
      std::copy(symbols.begin() + static_cast<int64_t>(best) + 2, symbols.begin() + static_cast<int64_t>(count),
                symbols.begin() + static_cast<int64_t>(best) + 1);
      std::copy(next + best + 2, next + count, next + best + 1);
      --count;
      look_up(best);
      if (best > 0) look_up(best - 1);
    }
    symbols.resize(count);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

void BytePairMerges::ApplyToLong(std::vector<int32_t>& symbols) const {
  const auto count = static_cast<int32_t>(symbols.size());
  std::vector<int32_t> previous(count), next(count);  // of the symbols that are left; -1: none
  for (int32_t i = 0; i < count; ++i) {
    previous[i] = i - 1;
    next[i] = i + 1 < count ? i + 1 : -1;
  }
  struct Candidate {
    int32_t rank, at, joined, left, right;
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  std::vector<Candidate> first;
  const auto candidate = [&](int32_t at) -> Candidate {
    if (at < 0 || next[at] < 0) return {kNoRank, 0, 0, 0, 0};
    const Pair* pair = Find(symbols[at], symbols[next[at]]);
    if (pair == nullptr) return {kNoRank, 0, 0, 0, 0};
    return {pair->rank, at, pair->joined, symbols[at], symbols[next[at]]};
  };
  for (int32_t i = 0; i < count; ++i) {
    if (const Candidate found = candidate(i); found.rank != kNoRank) first.push_back(found);
  }
  std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(first));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    // It may have gone since: joined with another neighbour, or its neighbour was.
    const int32_t right = next[best.at];
    if (symbols[best.at] != best.left || right < 0 || symbols[right] != best.right) continue;
    symbols[best.at] = best.joined;
    symbols[right] = -1;
    next[best.at] = next[right];
    if (next[right] >= 0) previous[next[right]] = best.at;
    next[right] = -1;
    for (const int32_t at : {best.at, previous[best.at]}) {
      if (const Candidate found = candidate(at); found.rank != kNoRank) queue.push(found);
    }
  }
  symbols.erase(std::remove(symbols.begin(), symbols.end(), -1), symbols.end());
}

}  // namespace memserve::engine
