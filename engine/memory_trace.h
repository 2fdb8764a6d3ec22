// Which rows fired for chosen tokens of one sequence: what was asked for, and what is known and not told yet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/batch.h"
#include "engine/model/config.h"
#include "engine/request.h"

namespace memserve::engine {

struct SequenceTrace {
  int64_t begin = 0, end = 0;       // positions that are told; none where they are equal
  int64_t next = 0;                 // those before it were told
  int32_t entries = 0;              // for each memory head
  std::vector<int32_t> layers;      // by their place among the memory layers
  std::vector<TokenTrace> waiting;  // for a token to be drawn; positions ascend

  bool Wants(int64_t position) const { return position >= begin && position >= next && position < end; }
  // Of `tokens` that may be taken from the prefix cache, so many that none is wanted.
  int64_t Cacheable(int64_t tokens) const { return next < end ? std::min(tokens, std::max(begin, next)) : tokens; }
  // What was computed at a position. Of a position that was there before (it was computed again) the newer holds, and nothing after
  // it.
  void Add(TokenTrace trace);
  // Those before `position`, which count as told.
  std::vector<TokenTrace> TakeBefore(int64_t position);
};

// All but the bound, which depends on the number of tokens.
absl::Status Validate(const MemoryTraceParams& params, const MemoryConfig& config);
// Of valid params. INVALID_ARGUMENT where more than `max_entries` were asked for by number.
absl::StatusOr<SequenceTrace> Resolve(const MemoryTraceParams& params, const MemoryConfig& config, int64_t prompt_tokens,
                                      int64_t max_draws, int64_t max_entries);

// What a step's result says of the traced token `index` of `num_traced`.
TokenTrace TraceOf(const StepResult& result, int64_t index, int64_t num_traced, const SequenceTrace& sequence,
                   const MemoryConfig& config);

}  // namespace memserve::engine
