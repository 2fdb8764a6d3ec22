#include "engine/drafts.h"

#include <algorithm>

namespace memserve::engine {

std::vector<int32_t> Drafts::Guess(absl::Span<const int32_t> tokens, int64_t most) {
  most = std::min<int64_t>(most, limit_);
  if (most <= 0) return {};
  if (misses_ >= kMisses && ++paused_ % kPause != 0) return {};
  const auto size = static_cast<int64_t>(tokens.size());
  for (int64_t length = std::min<int64_t>(params_.max_ngram, size - 1); length >= params_.min_ngram; --length) {
    const absl::Span<const int32_t> end = tokens.last(length);
    for (int64_t at = size - 1; at >= length; --at) {
      if (tokens[at - 1] != end.back() || tokens.subspan(at - length, length) != end) continue;
      std::vector<int32_t> guess;
      for (int64_t i = 0; i < most; ++i) guess.push_back(at + i < size ? tokens[at + i] : guess[at + i - size]);
      return guess;
    }
  }
  return {};
}

void Drafts::Learn(int64_t guessed, int64_t accepted) {
  guessed_ += static_cast<int32_t>(guessed);
  accepted_ += static_cast<int32_t>(accepted);
  misses_ = accepted > 0 ? 0 : misses_ + 1;
  const int64_t next = accepted == guessed ? 2 * guessed : accepted + 1;
  limit_ = static_cast<int32_t>(std::clamp<int64_t>(next, 1, params_.max_draft_tokens));
}

}  // namespace memserve::engine
