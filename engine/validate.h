// Checks what a request asks for against what the engine can do. INVALID_ARGUMENT names field, value and limit.
#pragma once

#include "absl/status/status.h"
#include "engine/batch.h"
#include "engine/engine.h"
#include "engine/memory_mode.h"
#include "engine/memory_trace.h"
#include "engine/request.h"

namespace memserve::engine {

inline constexpr size_t kMaxStopStrings = 16;
inline constexpr size_t kMaxStopStringBytes = 256;
inline constexpr size_t kMaxStopTokenIds = 64;
inline constexpr size_t kMaxContinuations = 256;
inline constexpr size_t kMaxIdBytes = 256;
inline constexpr size_t kMaxSaltBytes = 256;
inline constexpr int32_t kMaxPriority = 1000;
inline constexpr int32_t kMaxChoices = 128;
inline constexpr size_t kMaxBadWordBytes = 256;
inline constexpr int32_t kMaxDraftTokens = 16;
inline constexpr int64_t kMaxPromptLogprobs = 1 << 20;  // entries of a reply
inline constexpr size_t kMaxMessages = 4096;
inline constexpr size_t kMaxRoleBytes = 64;

struct RequestLimits {
  int vocab_size = 0;
  int max_context_tokens = 0;
  int64_t max_prompt_bytes = 0;
  bool has_tokenizer = false;
  absl::Status chat_template;  // not OK: why there is none
  MemoryConfig memory;         // no layers: the model has no memory
};

// All but the number of tokens of a text, which is known later.
absl::Status Validate(const GenerateRequest& request, const RequestLimits& limits);
absl::Status Validate(const ScoreRequest& request, const RequestLimits& limits);

// A reply with so many of the likeliest tokens beside each of `tokens` is not too large.
absl::Status ValidatePromptLogprobs(int64_t tokens, int32_t top);

// A prompt of `tokens` leaves room for at least one more, and is not empty.
absl::Status ValidatePromptLength(int64_t tokens, int max_context_tokens);

}  // namespace memserve::engine
