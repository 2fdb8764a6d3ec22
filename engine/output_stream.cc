#include "engine/output_stream.h"

#include <utility>

namespace memserve::engine {

OutputStream::OutputStream(OutputOptions options, std::shared_ptr<RequestControl> control, std::shared_ptr<GenerateListener> listener,
                           std::function<void()> on_ended)
    : options_(std::move(options)),
      control_(std::move(control)),
      listener_(std::move(listener)),
      on_ended_(std::move(on_ended)),
      matcher_(options_.stop_strings) {
  if (options_.tokenizer != nullptr) detokenizer_.emplace(*options_.tokenizer, options_.starts_text, /*keep_special=*/false);
}

void OutputStream::OnToken(int32_t id, float logprob, std::vector<TokenLogprob> top, std::vector<TokenTrace> traces, bool shown) {
  if (matcher_.matched()) return;  // drawn before the engine heard of the stop
  ++completion_tokens_;
  Delta delta;
  if (shown) {
    std::string text = detokenizer_ ? detokenizer_->Append(id) : "";
    delta.text = completion_tokens_ <= options_.min_tokens ? std::move(text) : matcher_.Append(text);
  }
  delta.token_ids = {id};
  if (options_.logprobs) delta.logprobs = {logprob};
  if (!top.empty()) delta.top_logprobs = {std::move(top)};
  delta.memory_traces = std::move(traces);
  if (options_.token_bytes) delta.token_bytes = {options_.tokenizer == nullptr ? "" : options_.tokenizer->TokenBytes(id)};
  if (matcher_.matched()) control_->stop_matched = true;
  listener_->OnDelta(std::move(delta));
}

void OutputStream::OnEnd(const EngineEnd& end) {
  on_ended_();
  if (!end.status.ok() && !matcher_.matched()) {
    listener_->OnFinished(end.status);
    return;
  }
  Finished finished;
  finished.reason = matcher_.matched() ? FinishReason::kStop : end.reason;
  if (matcher_.matched()) {
    finished.stop_string = matcher_.matched();
  } else {
    finished.text = matcher_.Append(detokenizer_ ? detokenizer_->Finish() : "");
    if (matcher_.matched()) {
      finished.stop_string = matcher_.matched();
      finished.reason = FinishReason::kStop;
    } else {
      finished.text += matcher_.Finish();
      finished.stop_token_id = end.stop_token_id;
    }
  }
  finished.usage = {
      .prompt_tokens = options_.prompt_tokens, .cached_tokens = end.cached_tokens, .completion_tokens = completion_tokens_};
  finished.timings = end.timings;
  finished.seed = options_.seed;
  listener_->OnFinished(std::move(finished));
}

}  // namespace memserve::engine
