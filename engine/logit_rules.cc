#include "engine/logit_rules.h"

#include <algorithm>
#include <limits>

namespace memserve::engine {
namespace {

constexpr float kBan = -std::numeric_limits<float>::infinity();

}  // namespace

std::unique_ptr<LogitRules> LogitRules::New(const SamplingParams& params, float temperature, const std::vector<int32_t>& stop_ids,
                                            int32_t min_tokens, std::vector<std::vector<int32_t>> bad_words, int vocab_size) {
  std::unique_ptr<LogitRules> rules(new LogitRules);
  LogitRules& r = *rules;
  r.adjustment_ = {.repetition_penalty = params.repetition_penalty.value_or(1.0f),
                   .frequency_penalty = params.frequency_penalty,
                   .presence_penalty = params.presence_penalty,
                   .min_p = params.min_p.value_or(0.0f),
                   .typical_p = params.typical_p.value_or(1.0f),
                   .temperature = temperature};
  r.looks_back_ = r.adjustment_.repetition_penalty != 1 || params.frequency_penalty != 0 || params.presence_penalty != 0;
  r.window_ = params.penalty_window;
  for (const auto& [token, value] : params.logit_bias) {
    r.bias_tokens_.push_back(token);
    r.bias_values_.push_back(value);
  }
  for (int32_t token : params.banned_token_ids) {
    r.bias_tokens_.push_back(token);
    r.bias_values_.push_back(kBan);
  }
  r.bad_words_ = std::move(bad_words);
  r.stop_ids_ = stop_ids;
  r.min_tokens_ = min_tokens;
  if (!params.allowed_token_ids.empty()) {
    r.mask_.resize((vocab_size + 31) / 32);
    for (int32_t token : params.allowed_token_ids) r.mask_[token / 32] |= 1u << (token % 32);
  }
  const bool cuts = temperature > 0 && (r.adjustment_.min_p > 0 || r.adjustment_.typical_p < 1);
  if (!r.looks_back_ && !cuts && r.bias_tokens_.empty() && r.bad_words_.empty() && r.mask_.empty() && (min_tokens == 0 || stop_ids.empty())) return nullptr;
  return rules;
}

void LogitRules::Add(int32_t token, bool drawn) {
  Count& count = counts_[token];
  ++count.seen;
  count.drawn += drawn ? 1 : 0;
}

void LogitRules::TakeAway(int32_t token, bool drawn) {
  const auto found = counts_.find(token);
  found->second.drawn -= drawn ? 1 : 0;
  if (--found->second.seen == 0) counts_.erase(found);
}

// Brings the counts to the window that ends at `end`.
void LogitRules::CountWindow(absl::Span<const int32_t> tokens, int64_t end, int64_t prompt_tokens) {
  const int64_t begin = window_ > 0 ? std::max<int64_t>(0, end - window_) : 0;
  const auto drawn = [&](int64_t at) { return at >= prompt_tokens; };
  for (; counted_end_ < end; ++counted_end_) Add(tokens[counted_end_], drawn(counted_end_));
  for (; counted_begin_ > begin; --counted_begin_) Add(tokens[counted_begin_ - 1], drawn(counted_begin_ - 1));
  for (; counted_end_ > end; --counted_end_) TakeAway(tokens[counted_end_ - 1], drawn(counted_end_ - 1));
  for (; counted_begin_ < begin; ++counted_begin_) TakeAway(tokens[counted_begin_], drawn(counted_begin_));
}

void LogitRules::TakeBack(absl::Span<const int32_t> tokens, int64_t size, int64_t prompt_tokens) {
  if (looks_back_) CountWindow(tokens, size, prompt_tokens);
}

void LogitRules::AddTo(Batch& batch, absl::Span<const int32_t> tokens, int64_t prompt_tokens) {
  kernels::LogitAdjustment adjustment = adjustment_;
  adjustment.seen_begin = static_cast<int32_t>(batch.seen_tokens.size());
  if (looks_back_) {
    CountWindow(tokens, static_cast<int64_t>(tokens.size()), prompt_tokens);
    for (const auto& [token, count] : counts_) {
      batch.seen_tokens.push_back(token);
      batch.seen_counts.push_back(count.drawn);
    }
  }
  adjustment.seen_end = static_cast<int32_t>(batch.seen_tokens.size());
  adjustment.bias_begin = static_cast<int32_t>(batch.bias_tokens.size());
  batch.bias_tokens.insert(batch.bias_tokens.end(), bias_tokens_.begin(), bias_tokens_.end());
  batch.bias_values.insert(batch.bias_values.end(), bias_values_.begin(), bias_values_.end());
  if (static_cast<int64_t>(tokens.size()) - prompt_tokens < min_tokens_) {
    batch.bias_tokens.insert(batch.bias_tokens.end(), stop_ids_.begin(), stop_ids_.end());
    batch.bias_values.insert(batch.bias_values.end(), stop_ids_.size(), kBan);
  }
  const absl::Span<const int32_t> drawn = tokens.subspan(prompt_tokens);
  for (const std::vector<int32_t>& word : bad_words_) {
    const size_t before = word.size() - 1;
    if (drawn.size() < before || !std::equal(word.begin(), word.end() - 1, drawn.end() - static_cast<int64_t>(before))) continue;
    batch.bias_tokens.push_back(word.back());
    batch.bias_values.push_back(kBan);
  }
  adjustment.bias_end = static_cast<int32_t>(batch.bias_tokens.size());
  if (!mask_.empty()) {
    adjustment.mask_row = static_cast<int32_t>(batch.masks.size() / mask_.size());
    batch.masks.insert(batch.masks.end(), mask_.begin(), mask_.end());
  }
  batch.adjustments.push_back(adjustment);
}

}  // namespace memserve::engine
