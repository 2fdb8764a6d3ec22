// From drawn tokens to text: what a listener hears of one generation. Used by the output thread only, once the sequences run.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/request.h"
#include "engine/sequence.h"
#include "engine/stop_matcher.h"
#include "engine/tokenizer/tokenizer.h"

namespace memserve::engine {

// Why the engine thread ended a sequence, with what it knows.
struct EngineEnd {
  absl::Status status;  // not OK: an error, and the rest is meaningless
  FinishReason reason = FinishReason::kLength;
  std::optional<int32_t> stop_token_id;
  int32_t cached_tokens = 0;
  int32_t draft_tokens = 0;
  int32_t accepted_draft_tokens = 0;
  Timings timings;
};

// What the choices of one generation have in common: their listener, and how many are to be heard of. Where more are drawn than
// given, all are kept until the last has ended; else what is drawn is passed on at once.
class GenerationOutput {
 public:
  // Draws `drawn` choices, of which `given` are given. `on_ended` runs just before the listener hears the last: from then on the
  // request's id is free.
  GenerationOutput(std::shared_ptr<GenerateListener> listener, std::shared_ptr<RequestControl> control,
                   std::function<void()> on_ended, int given, int drawn);

  void OnPrompt(PromptDelta delta) { listener_->OnPrompt(std::move(delta)); }
  void OnDelta(Delta delta);
  // `score` tells which choices are better. The first error ends the request, once all its sequences have ended.
  void OnEnded(absl::StatusOr<Finished> finished, double score);

 private:
  struct Kept {
    Delta delta;  // all of them
    Finished finished;
    double score = 0;
  };

  void GiveBest();

  const std::shared_ptr<GenerateListener> listener_;
  const std::shared_ptr<RequestControl> control_;
  const std::function<void()> on_ended_;
  const int given_;
  int left_;  // not ended
  int32_t completion_tokens_ = 0;
  absl::Status error_;
  std::vector<Kept> kept_;  // empty: nothing is kept
};

struct OutputOptions {
  const Tokenizer* tokenizer = nullptr;  // null: ids only
  std::vector<std::string> stop_strings;
  bool include_stop = false;
  int32_t min_tokens = 0;  // no stop string is looked for before
  bool logprobs = false;
  bool token_bytes = false;
  bool starts_text = false;  // nothing stands before the first token
  int32_t choice = 0;
  uint64_t seed = 0;
  int32_t prompt_tokens = 0;
};

// One token that was drawn, with what was asked for beside it.
struct DrawnToken {
  int32_t id = 0;
  float logprob = 0;
  std::vector<TokenLogprob> top;
  std::vector<float> chosen;
  std::vector<TokenTrace> traces;
  bool stops = false;  // by its id: it has no text, unless that is asked for
};

// One choice.
class OutputStream {
 public:
  OutputStream(OutputOptions options, std::shared_ptr<GenerationOutput> generation);

  void OnToken(DrawnToken token);
  // Of the prompt.
  void OnPrompt(PromptDelta delta) { generation_->OnPrompt(std::move(delta)); }
  void OnEnd(const EngineEnd& end);

  // A stop string was found: draw no more. Any thread.
  bool stop_matched() const { return stop_matched_; }

 private:
  const OutputOptions options_;
  const std::shared_ptr<GenerationOutput> generation_;
  std::optional<Detokenizer> detokenizer_;  // with a tokenizer
  StopMatcher matcher_;
  std::atomic<bool> stop_matched_{false};
  int32_t completion_tokens_ = 0;
  double logprob_ = 0;  // of all tokens
};

// The prompt itself, in parts of a bounded size. A begin-of-sequence token has no text.
std::vector<PromptDelta> EchoOf(const std::vector<int32_t>& tokens, const Tokenizer* tokenizer, bool token_bytes);

}  // namespace memserve::engine
