// What an engine will hold, computed before anything is allocated.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/executor.h"
#include "engine/options.h"

namespace memserve::engine {

struct StartPlan {
  ExecutorOptions executor;
  std::vector<RankPlan> ranks;
  int64_t available_bytes = 0;  // what may be used
  int64_t total() const;
  int64_t Sum(int64_t RankPlan::*part) const;
};

// Resolves every "auto" of the options against checkpoint and machine, checks all tensors, counts bytes. INVALID_ARGUMENT: an option;
// RESOURCE_EXHAUSTED: it does not fit, and the message says what would.
absl::StatusOr<StartPlan> MakeStartPlan(const EngineOptions& options, const ModelConfig& config, const Checkpoint& checkpoint);

// "1.5 GiB"
std::string FormatBytes(int64_t bytes);

// Memory that this process may still take: what the machine has free, or less where a control group limits it.
int64_t AvailableMemory();

}  // namespace memserve::engine
