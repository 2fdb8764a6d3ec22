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
  struct Place {
    int32_t previous, next;  // the symbols beside it that are left; -1: none
    Pair pair;               // with the next
  };
  std::vector<Place> places(static_cast<size_t>(count));
  const auto look_up = [&](int32_t at) {
    const int32_t next = places[at].next;
    const Pair* found = next < 0 ? nullptr : Find(symbols[at], symbols[next]);
    places[at].pair = found == nullptr ? Pair{kNoRank, 0} : *found;
  };
  // Rank in the upper half, place in the lower: the least comes first.
  std::vector<uint64_t> first;
  const auto entry = [&](int32_t at) { return static_cast<uint64_t>(places[at].pair.rank) << 32 | static_cast<uint32_t>(at); };
  first.reserve(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    places[i].previous = i - 1;
    places[i].next = i + 1 < count ? i + 1 : -1;
    look_up(i);
    if (places[i].pair.rank != kNoRank) first.push_back(entry(i));
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<uint64_t>> queue(std::greater<uint64_t>(), std::move(first));
  while (!queue.empty()) {
    const uint64_t best = queue.top();
    queue.pop();
    const auto at = static_cast<int32_t>(best & 0xffffffff);
    Place& place = places[at];
    // It may have changed since: joined with another neighbour, or its neighbour was. Equal ranks are one pair.
    if (place.pair.rank != static_cast<int32_t>(best >> 32)) continue;
    const int32_t right = place.next;
    symbols[at] = place.pair.joined;
    symbols[right] = -1;
    places[right].pair.rank = kNoRank;
    place.next = places[right].next;
    if (place.next >= 0) places[place.next].previous = at;
    look_up(at);
    if (place.pair.rank != kNoRank) queue.push(entry(at));
    if (place.previous < 0) continue;
    look_up(place.previous);
    if (places[place.previous].pair.rank != kNoRank) queue.push(entry(place.previous));
  }
  symbols.erase(std::remove(symbols.begin(), symbols.end(), -1), symbols.end());
}

}  // namespace memserve::engine
