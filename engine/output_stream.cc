#include "engine/output_stream.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace memserve::engine {
namespace {

constexpr size_t kEchoTokens = 1024;  // in one part

template <typename T>
void Append(std::vector<T> from, std::vector<T>& to) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

void Join(Delta from, Delta& to) {
  to.text += from.text;
  Append(std::move(from.token_ids), to.token_ids);
  Append(std::move(from.logprobs), to.logprobs);
  Append(std::move(from.token_bytes), to.token_bytes);
  Append(std::move(from.top_logprobs), to.top_logprobs);
  Append(std::move(from.chosen_logprobs), to.chosen_logprobs);
  Append(std::move(from.memory_traces), to.memory_traces);
}

}  // namespace

GenerationOutput::GenerationOutput(std::shared_ptr<GenerateListener> listener, std::shared_ptr<RequestControl> control,
                                   std::function<void()> on_ended, int given, int drawn)
    : listener_(std::move(listener)),
      control_(std::move(control)),
      on_ended_(std::move(on_ended)),
      given_(given),
      left_(drawn),
      kept_(drawn > given ? drawn : 0) {}

void GenerationOutput::OnDelta(Delta delta) {
  if (!error_.ok()) return;
  if (kept_.empty()) {
    listener_->OnDelta(std::move(delta));
    return;
  }
  Delta& to = kept_[delta.choice].delta;
  Join(std::move(delta), to);
}

void GenerationOutput::OnEnded(absl::StatusOr<Finished> finished, double score) {
  const bool last = --left_ == 0;
  if (!finished.ok() && error_.ok()) {
    error_ = finished.status();
    control_->End(error_.code());
  }
  if (!error_.ok()) {
    if (!last) return;
    on_ended_();
    listener_->OnFinished(error_);
    return;
  }
  completion_tokens_ += finished->usage.completion_tokens;
  finished->last = last;
  if (last) {
    finished->usage.all_completion_tokens = completion_tokens_;
    on_ended_();
  }
  if (kept_.empty()) {
    listener_->OnFinished(std::move(finished));
    return;
  }
  Kept& kept = kept_[finished->choice];
  kept.finished = *std::move(finished);
  kept.score = score;
  if (last) GiveBest();
}

void GenerationOutput::GiveBest() {
  std::stable_sort(kept_.begin(), kept_.end(), [](const Kept& a, const Kept& b) { return a.score > b.score; });
  for (int rank = 0; rank < given_; ++rank) {
    Kept& kept = kept_[rank];
    kept.delta.choice = kept.finished.choice = rank;
    kept.finished.last = rank + 1 == given_;
    kept.finished.usage.all_completion_tokens = kept.finished.last ? completion_tokens_ : 0;
    listener_->OnDelta(std::move(kept.delta));
    listener_->OnFinished(std::move(kept.finished));
  }
}

OutputStream::OutputStream(OutputOptions options, std::shared_ptr<GenerationOutput> generation)
    : options_(std::move(options)), generation_(std::move(generation)), matcher_(options_.stop_strings, options_.include_stop) {
  if (options_.tokenizer != nullptr) detokenizer_.emplace(*options_.tokenizer, options_.starts_text, /*keep_special=*/false);
}

void OutputStream::OnToken(DrawnToken token) {
  if (matcher_.matched()) return;  // drawn before the engine heard of the stop
  ++completion_tokens_;
  logprob_ += token.logprob;
  Delta delta;
  delta.choice = options_.choice;
  if (!token.stops || options_.include_stop) {
    std::string text = detokenizer_ ? detokenizer_->Append(token.id) : "";
    delta.text = completion_tokens_ <= options_.min_tokens ? std::move(text) : matcher_.Append(text);
  }
  delta.token_ids = {token.id};
  if (options_.logprobs) delta.logprobs = {token.logprob};
  if (!token.top.empty()) delta.top_logprobs = {std::move(token.top)};
  if (!token.chosen.empty()) delta.chosen_logprobs = {std::move(token.chosen)};
  if (options_.token_bytes) delta.token_bytes = {options_.tokenizer == nullptr ? "" : options_.tokenizer->TokenBytes(token.id)};
  delta.memory_traces = std::move(token.traces);
  if (matcher_.matched()) stop_matched_ = true;
  generation_->OnDelta(std::move(delta));
}

void OutputStream::OnEnd(const EngineEnd& end) {
  if (!end.status.ok() && !matcher_.matched()) {
    generation_->OnEnded(end.status, 0);
    return;
  }
  Finished finished;
  finished.choice = options_.choice;
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
  finished.usage = {.prompt_tokens = options_.prompt_tokens,
                    .cached_tokens = end.cached_tokens,
                    .completion_tokens = completion_tokens_,
                    .draft_tokens = end.draft_tokens,
                    .accepted_draft_tokens = end.accepted_draft_tokens};
  finished.timings = end.timings;
  finished.seed = options_.seed;
  generation_->OnEnded(std::move(finished), completion_tokens_ == 0 ? 0 : logprob_ / completion_tokens_);
}

std::vector<PromptDelta> EchoOf(const std::vector<int32_t>& tokens, const Tokenizer* tokenizer, bool token_bytes) {
  std::optional<Detokenizer> detokenizer;
  if (tokenizer != nullptr) detokenizer.emplace(*tokenizer, /*at_start=*/true, /*keep_special=*/true);
  std::vector<PromptDelta> parts;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i % kEchoTokens == 0) parts.push_back({.first = static_cast<int32_t>(i)});
    PromptDelta& part = parts.back();
    part.token_ids.push_back(tokens[i]);
    if (token_bytes) part.token_bytes.push_back(tokenizer == nullptr ? "" : tokenizer->TokenBytes(tokens[i]));
    if (detokenizer && !(i == 0 && tokens[i] == tokenizer->bos_id())) part.text += detokenizer->Append(tokens[i]);
  }
  if (detokenizer && !parts.empty()) parts.back().text += detokenizer->Finish();
  return parts;
}

}  // namespace memserve::engine
