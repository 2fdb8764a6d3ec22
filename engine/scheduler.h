// Decides which sequences run in the next step and fills its batch. Engine thread only.
//
// Decode tokens first, then chunks of prompts, up to max_batch_tokens. Waiting sequences are taken in the order of arrival, once there
// are pages for all the tokens that they may come to (so a running sequence never lacks one).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "engine/batch.h"
#include "engine/kv_cache.h"
#include "engine/sequence.h"

namespace memserve::engine {

struct SchedulerOptions {
  int64_t max_batch_tokens = 512;
  int64_t max_sequences = 64;
};

// A step on its way: its batch, and whom each logit slot belongs to.
struct StepPlan {
  Batch batch;
  std::vector<std::shared_ptr<Sequence>> sampled;  // [slots that sample]
  std::vector<std::shared_ptr<Sequence>> scored;   // [slots that are scored]
  int64_t prompt_tokens = 0;                       // in this batch
};

class Scheduler {
 public:
  Scheduler(const SchedulerOptions& options, KvCache* cache) : options_(options), cache_(*cache) {}

  void Add(std::shared_ptr<Sequence> sequence);

  // The next step; an empty batch when nothing can run. `step` numbers it.
  StepPlan Schedule(int64_t step, absl::Time now);

  // The sequence will not run again: its pages are free at once. (Steps in flight may still write to them; a step that reads them for
  // another sequence comes later in the same stream.)
  void Remove(const std::shared_ptr<Sequence>& sequence);

  // Calls `visit` for every sequence, running and waiting; those for which it returns true are removed.
  void RemoveIf(const std::function<bool(const std::shared_ptr<Sequence>&)>& visit);

  int running() const { return static_cast<int>(running_.size()); }
  int waiting() const { return static_cast<int>(waiting_.size()); }
  int64_t waiting_tokens() const { return waiting_tokens_; }

 private:
  void Admit();
  void PlanTokens(const std::shared_ptr<Sequence>& sequence, int64_t count, int64_t step, absl::Time now, StepPlan& plan);

  const SchedulerOptions options_;
  KvCache& cache_;
  std::deque<std::shared_ptr<Sequence>> waiting_;
  std::vector<std::shared_ptr<Sequence>> running_;  // in the order of arrival
  int64_t waiting_tokens_ = 0;
};

}  // namespace memserve::engine
