// How a sequence changes its logits: what was asked for, and what was seen so far. Engine thread only, once it runs.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "engine/batch.h"
#include "engine/request.h"
#include "engine/structured/grammar.h"

namespace memserve::engine {

class LogitRules {
 public:
  // If given, allows the tokens that match it, and `end_ids` where what was drawn matches as it is; never any of `not_first` as the
  // first.
  struct GrammarRules {
    std::unique_ptr<GrammarMatcher> matcher;  // null: no grammar
    std::vector<int32_t> end_ids;
    std::vector<int32_t> not_first;
  };
  // Null where the request changes nothing. Temperature, min_p, … as resolved against the checkpoint's defaults. `stop_ids` are
  // banned until min_tokens are drawn; the last token of a bad word after those before it.
  static std::unique_ptr<LogitRules> New(const SamplingParams& params, float temperature, const std::vector<int32_t>& stop_ids,
                                         int32_t min_tokens, std::vector<std::vector<int32_t>> bad_words, int vocab_size,
                                         GrammarRules grammar = {});
  bool has_grammar() const { return grammar_.matcher != nullptr; }

  // What the grammar says after these tokens.
  enum class Match {
    kGoesOn,    // there is something to draw
    kComplete,  // they match, and nothing may follow (but what ends)
    kStuck,     // they do not match, or nothing that would is allowed
  };
  Match MatchOf(absl::Span<const int32_t> tokens, int64_t prompt_tokens);
  // The most that the grammar took for one token, of the time of the threads that asked.
  absl::Duration slowest_match() const { return grammar_.matcher->slowest(); }

  // Adds the adjustment of the slot after `tokens` to the batch: prompt and all that was drawn, or is guessed to be.
  void AddTo(Batch& batch, absl::Span<const int32_t> tokens, int64_t prompt_tokens);
  // Takes back what `tokens` has beyond the first `size`.
  void TakeBack(absl::Span<const int32_t> tokens, int64_t size, int64_t prompt_tokens);

 private:
  struct Count {
    int32_t seen = 0;   // in the window
    int32_t drawn = 0;  // of those, not in the prompt
  };

  LogitRules() = default;
  void CountWindow(absl::Span<const int32_t> tokens, int64_t end, int64_t prompt_tokens);
  void Add(int32_t token, bool drawn);
  void TakeAway(int32_t token, bool drawn);
  // Of the tokens that may be drawn next by grammar and allowed_token_ids, after what the matcher has. Tokens that only end are not
  // among them.
  std::vector<uint32_t> GrammarMask(int64_t drawn);

  kernels::LogitAdjustment adjustment_;
  bool looks_back_ = false;
  int64_t window_ = 0;
  std::vector<int32_t> bias_tokens_;
  std::vector<float> bias_values_;
  std::vector<std::vector<int32_t>> bad_words_;
  std::vector<int32_t> stop_ids_;
  int32_t min_tokens_ = 0;
  std::vector<int32_t> banned_;
  std::vector<uint32_t> mask_;  // of all tokens that are allowed; empty: all are
  GrammarRules grammar_;        // without a matcher: none

  absl::flat_hash_map<int32_t, Count> counts_;
  int64_t counted_begin_ = 0, counted_end_ = 0;  // tokens [begin, end) are in counts_
};

}  // namespace memserve::engine
