// What the engine says of itself once it is loaded, and its start-up log.
#pragma once

#include <cstdint>
#include <string>

#include "engine/checkpoint_folder.h"
#include "engine/engine.h"
#include "engine/executor.h"
#include "engine/start_plan.h"

namespace memserve::engine {

ModelInfo Describe(const EngineOptions& options, const CheckpointFolder& loaded, const StartPlan& plan, const Executor& executor);

void LogPlan(const StartPlan& plan);

// Says how many weights are NaN or infinite, if any are.
void WarnOfNotFinite(const Executor& executor);

// Resident memory of this process as /proc tells it: "VmRSS" now, "VmHWM" at its peak. 0 where there is no /proc.
int64_t ResidentBytes(const std::string& field);

}  // namespace memserve::engine
