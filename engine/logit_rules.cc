#include "engine/logit_rules.h"

#include <algorithm>
#include <limits>

namespace memserve::engine {
namespace {

constexpr float kBan = -std::numeric_limits<float>::infinity();

void AddMask(const std::vector<uint32_t>& mask, Batch& batch, kernels::LogitAdjustment& adjustment) {
  adjustment.mask_row = static_cast<int32_t>(batch.masks.size() / mask.size());
  batch.masks.insert(batch.masks.end(), mask.begin(), mask.end());
}

}  // namespace

std::unique_ptr<LogitRules> LogitRules::New(const SamplingParams& params, float temperature, const std::vector<int32_t>& stop_ids,
                                            int32_t min_tokens, int vocab_size, GrammarRules grammar) {
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
  r.stop_ids_ = stop_ids;
  r.min_tokens_ = min_tokens;
  if (!params.allowed_token_ids.empty()) {
    r.mask_.resize((vocab_size + 31) / 32);
    for (int32_t token : params.allowed_token_ids) r.mask_[token / 32] |= 1u << (token % 32);
  }
  r.banned_ = params.banned_token_ids;
  r.grammar_ = std::move(grammar);
  const bool cuts = temperature > 0 && (r.adjustment_.min_p > 0 || r.adjustment_.typical_p < 1);
  if (!r.looks_back_ && !cuts && r.bias_tokens_.empty() && r.mask_.empty() && !r.has_grammar() && (min_tokens == 0 || stop_ids.empty())) return nullptr;
  return rules;
}

// Brings the counts up to the last window of `tokens`, which only grows.
void LogitRules::CountUpTo(absl::Span<const int32_t> tokens, int64_t prompt_tokens) {
  const auto end = static_cast<int64_t>(tokens.size());
  const int64_t begin = window_ > 0 ? std::max<int64_t>(0, end - window_) : 0;
  for (; counted_end_ < end; ++counted_end_) {
    Count& count = counts_[tokens[counted_end_]];
    ++count.seen;
    count.drawn += counted_end_ >= prompt_tokens ? 1 : 0;
  }
  for (; counted_begin_ < begin; ++counted_begin_) {
    const auto found = counts_.find(tokens[counted_begin_]);
    found->second.drawn -= counted_begin_ >= prompt_tokens ? 1 : 0;
    if (--found->second.seen == 0) counts_.erase(found);
  }
}

std::vector<uint32_t> LogitRules::GrammarMask(int64_t drawn) {
  std::vector<uint32_t> mask = grammar_.matcher->Allowed();
  for (size_t i = 0; i < mask_.size(); ++i) mask[i] &= mask_[i];
  if (drawn > 0) return mask;
  for (const int32_t id : grammar_.not_first) mask[id / 32] &= ~(1u << (id % 32));
  return mask;
}

LogitRules::Match LogitRules::MatchOf(absl::Span<const int32_t> tokens, int64_t prompt_tokens) {
  const int64_t drawn = static_cast<int64_t>(tokens.size()) - prompt_tokens;
  if (!grammar_.matcher->MoveTo(tokens.subspan(prompt_tokens))) return Match::kStuck;
  std::vector<uint32_t> mask = GrammarMask(drawn);
  const auto ban = [&](const std::vector<int32_t>& ids) {
    for (const int32_t id : ids) mask[id / 32] &= ~(1u << (id % 32));
  };
  ban(banned_);
  ban(grammar_.end_ids);
  if (drawn < min_tokens_) ban(stop_ids_);
  if (std::any_of(mask.begin(), mask.end(), [](uint32_t word) { return word != 0; })) return Match::kGoesOn;
  return grammar_.matcher->IsComplete() ? Match::kComplete : Match::kStuck;
}

void LogitRules::AddTo(Batch& batch, absl::Span<const int32_t> tokens, int64_t prompt_tokens) {
  kernels::LogitAdjustment adjustment = adjustment_;
  adjustment.seen_begin = static_cast<int32_t>(batch.seen_tokens.size());
  if (looks_back_) {
    CountUpTo(tokens, prompt_tokens);
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
  adjustment.bias_end = static_cast<int32_t>(batch.bias_tokens.size());
  const int64_t drawn = static_cast<int64_t>(tokens.size()) - prompt_tokens;
  // A draft that does not match is rejected by the slot before: what is drawn after it is of no account.
  if (has_grammar() && grammar_.matcher->MoveTo(tokens.subspan(prompt_tokens))) {
    std::vector<uint32_t> mask = GrammarMask(drawn);
    for (const int32_t id : grammar_.end_ids) {
      const bool ends = grammar_.matcher->IsComplete() && (mask_.empty() || (mask_[id / 32] >> (id % 32) & 1) != 0);
      if (ends) mask[id / 32] |= 1u << (id % 32);
    }
    AddMask(mask, batch, adjustment);
  } else if (!mask_.empty()) {
    AddMask(mask_, batch, adjustment);
  }
  batch.adjustments.push_back(adjustment);
}

}  // namespace memserve::engine
