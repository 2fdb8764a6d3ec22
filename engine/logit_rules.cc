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
                                            int32_t min_tokens, std::vector<std::vector<int32_t>> bad_words, int vocab_size,
                                            GrammarRules grammar) {
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
  r.banned_ = params.banned_token_ids;
  r.grammar_ = std::move(grammar);
  const bool cuts = temperature > 0 && (r.adjustment_.min_p > 0 || r.adjustment_.typical_p < 1);
  const bool bans = !r.bias_tokens_.empty() || !r.bad_words_.empty() || !r.mask_.empty() || (min_tokens > 0 && !stop_ids.empty());
  if (!r.looks_back_ && !cuts && !bans && !r.has_grammar()) return nullptr;
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
  // A draft that does not match is rejected by the slot before: what is drawn after it is of no account.
  if (has_grammar() && grammar_.matcher->MoveTo(drawn)) {
    std::vector<uint32_t> mask = GrammarMask(static_cast<int64_t>(drawn.size()));
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
