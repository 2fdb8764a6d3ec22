// Byte-pair encoding of one piece of text: neighbours are joined, the pair of lowest rank first, until no pair is left.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace memserve::engine {

class BytePairMerges {
 public:
  // Of two pairs with one rank or of one pair added twice the later counts, as in a dictionary.
  void Add(int32_t left, int32_t right, int32_t rank, int32_t joined) { pairs_[Key(left, right)] = {rank, joined}; }
  void Reserve(size_t pairs) { pairs_.reserve(pairs); }

  // Joins within `symbols` and appends what is left to `ids`. Of equal ranks the leftmost first. n log n in the number of symbols.
  void Apply(std::vector<int32_t>& symbols, std::vector<int32_t>& ids) const;

 private:
  struct Pair {
    int32_t rank;
    int32_t joined;
  };
  static uint64_t Key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  const Pair* Find(int32_t left, int32_t right) const {
    const auto it = pairs_.find(Key(left, right));
    return it == pairs_.end() ? nullptr : &it->second;
  }
  void ApplyToLong(std::vector<int32_t>& symbols) const;

  absl::flat_hash_map<uint64_t, Pair> pairs_;
};

}  // namespace memserve::engine
