// Speculative decoding without a second model: what comes next is guessed to be what came next the last time that the sequence
// ended like this (prompt look-up decoding; a case of arXiv 2211.17192). A guess costs a place in the batch and never changes what
// is drawn.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "engine/request.h"

namespace memserve::engine {

// Of one sequence. Engine thread only.
class Drafts {
 public:
  explicit Drafts(const SpeculationParams& params) : params_(params), limit_(params.max_draft_tokens) {}

  // At most `most` tokens that may follow; fewer or none where nothing is known. Looks for the longest end of `tokens`, of
  // max_ngram to min_ngram tokens, that stands there before; the last such place counts. A guess that runs into the end goes on
  // with itself.
  std::vector<int32_t> Guess(absl::Span<const int32_t> tokens, int64_t most);

  // How many of the guesses were drawn: the next are more or fewer.
  void Learn(int64_t guessed, int64_t accepted);

  int32_t guessed() const { return guessed_; }    // in all
  int32_t accepted() const { return accepted_; }  // of these

 private:
  static constexpr int kMisses = 4;  // in a row: then only
  static constexpr int kPause = 8;   // every so many steps

  SpeculationParams params_;
  int32_t limit_;
  int misses_ = 0;
  int paused_ = 0;
  int32_t guessed_ = 0, accepted_ = 0;
};

}  // namespace memserve::engine
