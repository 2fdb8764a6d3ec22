// The life of a request inside the engine: what other threads may touch, and what the engine thread knows.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/drafts.h"
#include "engine/kv_cache.h"
#include "engine/logit_rules.h"
#include "engine/memory_mode.h"
#include "engine/memory_trace.h"
#include "engine/request.h"
#include "kernels/sampling.h"

namespace memserve::engine {

// One request as all threads see it. The engine thread obeys the flags at its next step.
struct RequestControl {
  std::string id;
  absl::Time deadline = absl::InfiniteFuture();
  absl::Time arrival;
  std::atomic<int> end_code{0};  // an absl::StatusCode: end with this; 0: go on

  void End(absl::StatusCode code) {
    int expected = 0;
    end_code.compare_exchange_strong(expected, static_cast<int>(code));
  }
};

class OutputStream;

// Gathers the scores of one request's continuations. Engine thread only, once they run.
struct ScoreState {
  ScoreCallback callback;
  ScoreResult result;
  int remaining = 0;  // continuations that have not ended
};

// Engine thread only (before it arrives there: the thread that builds it).
struct Sequence {
  std::shared_ptr<RequestControl> control;
  std::vector<int32_t> tokens;        // prompt, then what was drawn and collected
  int64_t prompt_tokens = 0;
  int64_t max_draws = 0;
  std::vector<int32_t> stop_ids;      // end-of-sequence tokens among them unless ignored
  float temperature = 0;
  int32_t top_k = 0;
  float top_p = 1;
  uint64_t seed = 0;
  int32_t choice = 0;  // among those of its request
  SequenceMemory memory;
  SequenceTrace trace;
  std::unique_ptr<LogitRules> rules;  // null: the logits stay as they are
  int32_t top_logprobs = 0;
  std::string structured_field;          // for errors: that of the grammar, if there is one
  std::vector<int32_t> chosen_logprobs;  // tokens whose logprobs are told beside each draw
  std::optional<Drafts> drafts;          // guesses at what follows, if asked for

  int32_t priority = 0;               // higher goes first
  // Is not taken up before this sequence has computed the prompt (or ended), so that its pages can be shared. May be null.
  std::shared_ptr<const Sequence> leader;

  // Tokens [score_begin, score_end) are scored. 0: none. Of a continuation that is all there is to do; of a prompt, draws follow.
  int64_t score_begin = 0, score_end = 0;
  int32_t prompt_top_logprobs = -1;   // of a prompt: beside each so many of the likeliest
  int score_index = 0;                // among the continuations of the request
  std::shared_ptr<ScoreState> score;  // then this hears the results,
  std::shared_ptr<OutputStream> output;  // else this

  // Progress. Planned means computed or in flight.
  int64_t planned = 0;                // tokens whose keys and values are written; falls to 0 when it is preempted
  int64_t scored_planned = 0;         // scores, and of these
  int64_t scored = 0;                 // collected
  int64_t draws_planned = 0;
  std::vector<int32_t> guessed;       // by drafts, in the step in flight: tokens after `tokens`
  int64_t accepted = 0;               // of these, so far
  int guessed_at = 0;                 // preemptions when they were planned
  int64_t last_draw_step = -1;        // the step in flight that draws the token after `tokens`, and its slot
  int32_t last_draw_slot = -1;
  std::vector<int32_t> pages;         // of the KV cache
  KvCache::Chain chain;               // those of them that are published; the root is set from the start
  int64_t order = 0;                  // of arrival
  int64_t cached_tokens = 0;          // of the prompt, found in the cache
  int preemptions = 0;
  int64_t waits_with = 0;             // tokens that it had when it began to wait
  bool ended = false;                 // results still in flight are discarded
  absl::Time first_step = absl::InfiniteFuture();
  absl::Time first_token = absl::InfiniteFuture();

  // A token that was drawn and counts. If it is the next guess, what was drawn after that guess counts too.
  void Append(int32_t token) {
    tokens.push_back(token);
    if (accepted < static_cast<int64_t>(guessed.size()) && guessed[accepted] == token) ++accepted;
  }
  // Once a step is collected: what follows a guess that was wrong was computed in vain.
  void TakeBackGuesses() {
    const auto size = static_cast<int64_t>(guessed.size());
    draws_planned -= size - accepted;
    if (guessed_at == preemptions) planned -= size - accepted;
    drafts->Learn(size, accepted);
    guessed.clear();
    accepted = 0;
  }

  bool scores() const { return score_begin > 0 && prompt_top_logprobs < 0; }  // and does not draw
  // Tokens that may be taken from the cache: the rest is wanted for its logits.
  int64_t cacheable_tokens() const {
    const bool wanted = score_begin + scored_planned < score_end;
    return trace.Cacheable(wanted ? score_begin - 1 + scored_planned : static_cast<int64_t>(tokens.size()) - 1);
  }
  // Tokens that the followers of a leader share with it.
  int64_t shared_tokens() const { return scores() ? score_begin - 1 : prompt_tokens - 1; }
  // Tokens whose keys and values are ever needed: all, but for the last one scored or drawn.
  int64_t most_tokens() const { return scores() ? static_cast<int64_t>(tokens.size()) - 1 : prompt_tokens + max_draws - 1; }
};

}  // namespace memserve::engine
