// From drawn tokens to text: what a listener hears of one generation. Used by the output thread only, once the sequence runs.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/request.h"
#include "engine/sequence.h"
#include "engine/stop_matcher.h"
#include "engine/tokenizer/tokenizer.h"

namespace memserve::engine {

// Why the engine thread ended a generation, with what it knows.
struct EngineEnd {
  absl::Status status;  // not OK: an error, and the rest is meaningless
  FinishReason reason = FinishReason::kLength;
  std::optional<int32_t> stop_token_id;
  int32_t cached_tokens = 0;
  Timings timings;
};

struct OutputOptions {
  const Tokenizer* tokenizer = nullptr;  // null: ids only
  std::vector<std::string> stop_strings;
  int32_t min_tokens = 0;  // no stop string is looked for before
  bool logprobs = false;
  bool token_bytes = false;
  bool starts_text = false;  // nothing stands before the first token
  uint64_t seed = 0;
  int32_t prompt_tokens = 0;
};

class OutputStream {
 public:
  // `on_ended` runs just before the listener hears the end: from then on the request's id is free.
  OutputStream(OutputOptions options, std::shared_ptr<RequestControl> control, std::shared_ptr<GenerateListener> listener,
               std::function<void()> on_ended);

  // One token that was drawn. `shown` is false for a token that stops: it has no text.
  void OnToken(int32_t id, float logprob, std::vector<TokenLogprob> top, std::vector<TokenTrace> traces, bool shown);
  void OnEnd(const EngineEnd& end);

 private:
  const OutputOptions options_;
  const std::shared_ptr<RequestControl> control_;
  const std::shared_ptr<GenerateListener> listener_;
  const std::function<void()> on_ended_;
  std::optional<Detokenizer> detokenizer_;  // with a tokenizer
  StopMatcher matcher_;
  int32_t completion_tokens_ = 0;
};

}  // namespace memserve::engine
