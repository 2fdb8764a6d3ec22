// Decides which sequences run in the next step and fills its batch. Engine thread only.
//
// Decode tokens first, then chunks of prompts, up to max_batch_tokens. Sequences are taken up by priority, then in the order of
// arrival, once there are pages for all the tokens that are known of them; pages for what they draw are found as they go. When
// there are none, the newest sequence of the lowest priority gives its pages back and is computed again later, with the same
// outcome: what was drawn stays drawn, and keys and values do not depend on the batches they were computed in.
//
// A sequence may guess what it will draw (drafts.h): its guesses run beside its last token, each with a slot of its own that draws
// as if they were right.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <vector>

#include "engine/batch.h"
#include "engine/kv_cache.h"
#include "engine/sequence.h"
#include "engine/step_times.h"

namespace memserve::engine {

struct SchedulerOptions {
  int64_t max_batch_tokens = 512;
  int64_t max_sequences = 64;
};

// A step on its way: its batch, and whom each logit slot belongs to.
struct StepPlan {
  Batch batch;
  struct Draw {
    std::shared_ptr<Sequence> sequence;
    int32_t token = 0;    // of the batch, whose logits are drawn from
    int32_t guesses = 0;  // the last so many tokens up to there are guessed: what is drawn counts if they were all drawn
    bool counts() const { return !sequence->ended && guesses <= sequence->accepted; }
  };
  std::vector<Draw> sampled;                       // [slots that sample]
  std::vector<std::shared_ptr<Sequence>> scored;   // [slots that are scored]
  struct Traced {
    std::shared_ptr<Sequence> sequence;
    int64_t position;
  };
  std::vector<Traced> traced;                      // beside batch.traced_tokens
  int64_t prompt_tokens = 0;                       // in this batch
  bool only_decodes = false;
  StepWork work;  // of the whole batch
};

class Scheduler {
 public:
  Scheduler(const SchedulerOptions& options, KvCache* cache) : options_(options), cache_(*cache) {}

  void Add(std::shared_ptr<Sequence> sequence);

  // The next step; an empty batch when nothing can run. `step` numbers it. Beside tokens that decode, as many tokens of prompts are
  // taken as `times` allows (at least one).
  StepPlan Schedule(int64_t step, absl::Time now, const StepTimes& times = StepTimes());

  // The sequence will not run again: its pages are free at once. (Steps in flight may still write to them; a step that reads them for
  // another sequence comes later in the same stream.)
  void Remove(const std::shared_ptr<Sequence>& sequence);

  // Calls `visit` for every sequence, running and waiting; those for which it returns true are removed.
  void RemoveIf(const std::function<bool(const std::shared_ptr<Sequence>&)>& visit);

  int running() const { return static_cast<int>(running_.size()); }
  int waiting() const { return static_cast<int>(waiting_.size()); }
  int preempted() const { return preempted_; }                // of those that wait
  int64_t waiting_tokens() const { return waiting_tokens_; }  // known of those that wait
  int64_t preemptions() const { return preemptions_; }        // since the start

 private:
  using Queue = std::list<std::shared_ptr<Sequence>>;  // by priority, then by arrival
  struct Planned {
    std::shared_ptr<Sequence> sequence;
    int64_t count;
  };

  void Wait(std::shared_ptr<Sequence> sequence);
  void Admit();
  bool TakeUp(const std::shared_ptr<Sequence>& sequence);
  bool Fork(Sequence& sequence);
  void Guess(Sequence& sequence, int64_t most);
  bool FindPageFor(const Sequence& sequence);
  void Preempt(Queue::iterator victim);
  void PlanTokens(const Planned& planned, int64_t step, absl::Time now, StepPlan& plan);
  void PublishPages(Sequence& sequence);
  void OrderSlots(StepPlan& plan);

  const SchedulerOptions options_;
  KvCache& cache_;
  Queue waiting_, running_;
  int64_t waiting_tokens_ = 0;
  std::vector<int32_t> page_copies_;  // of the next step
  int64_t next_order_ = 0;
  int64_t preemptions_ = 0;
  int preempted_ = 0;
};

}  // namespace memserve::engine
