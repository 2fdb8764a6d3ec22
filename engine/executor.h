// All ranks of a model, run as one: launches a batch on every rank and collects the first rank's results. The first rank runs on the
// caller's thread, each other on a thread of its own.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/rank.h"
#include "kernels/sync.h"

namespace memserve::engine {

struct ExecutorOptions {
  std::string backend = "cpu";  // cpu, reference
  int ranks = 1;
  int threads = 1;              // of all ranks together
  std::string isa = "auto";
  RankOptions rank;
};

// Engine thread only.
class Executor {
 public:
  // Loads all ranks side by side. `config` must outlive the executor.
  static absl::StatusOr<std::unique_ptr<Executor>> Load(const ModelConfig& config, const Checkpoint& checkpoint,
                                                        const ExecutorOptions& options);
  ~Executor();

  // Enqueues a step; at most two may be in flight. An error means that a device failed: the executor cannot go on.
  absl::Status Launch(const Batch& batch);
  // The results of the oldest step in flight.
  absl::StatusOr<StepResult> Collect();
  // One batch by itself; logits of its logit tokens, [num_slots, vocab_size]. `result`, if given, gets the rest.
  absl::StatusOr<std::vector<float>> ExecuteForLogits(const Batch& batch, StepResult* result = nullptr);

  // Rows of a value table in float, the columns of all ranks joined: [rows.size(), dim]. Between steps: it takes their scratch.
  absl::StatusOr<std::vector<float>> ReadRows(int64_t table, bool experts, const std::vector<int32_t>& rows);
  // See Rank::ReadCounts.
  std::vector<uint32_t> ReadCounts(int64_t table, int64_t first, int64_t count, bool reset) {
    return ranks_.front()->ReadCounts(table, first, count, reset);
  }

  const Rank& first_rank() const { return *ranks_.front(); }
  const std::vector<std::unique_ptr<Rank>>& ranks() const { return ranks_; }

 private:
  enum class Task { kLaunch, kCollect, kLogits, kCall, kStop };
  struct Mail {
    Task task;
    std::shared_ptr<const Batch> batch;
    std::function<void(Rank&)> call;
  };
  // A rank on a thread of its own.
  struct Follower {
    kernels::Mutex mutex;
    kernels::CondVar changed;
    std::deque<Mail> mailbox ABSL_GUARDED_BY(mutex);
    absl::Status status ABSL_GUARDED_BY(mutex);
    std::thread thread;
  };

  Executor() = default;
  void Send(Task task, std::shared_ptr<const Batch> batch);
  // Calls with every rank, on its own thread, behind what was launched; returns when all have returned. Ranks come in no order.
  void OnEachRank(const std::function<void(size_t index, Rank& rank)>& call);
  void Follow(Follower& follower, Rank& rank);
  absl::Status FollowerStatus();

  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<std::unique_ptr<Follower>> followers_;  // of ranks 1 and up
};

}  // namespace memserve::engine
