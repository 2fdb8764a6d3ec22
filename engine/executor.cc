#include "engine/executor.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {
namespace {

absl::StatusOr<std::unique_ptr<kernels::Backend>> NewBackend(const ExecutorOptions& options, int rank) {
  if (options.backend == "reference") return kernels::NewReferenceBackend();
  const int threads = options.threads / options.ranks + (rank < options.threads % options.ranks ? 1 : 0);
  return kernels::NewCpuBackend({.threads = std::max(1, threads), .isa = options.isa});
}

}  // namespace

absl::StatusOr<std::unique_ptr<Executor>> Executor::Load(const ModelConfig& config, const Checkpoint& checkpoint,
                                                         const ExecutorOptions& options) {
  std::unique_ptr<Executor> executor(new Executor);
  std::vector<std::unique_ptr<kernels::Collective>> collectives(options.ranks);
  if (options.ranks > 1) collectives = kernels::NewInMemoryCollectives(options.ranks);
  std::vector<absl::StatusOr<std::unique_ptr<Rank>>> loaded(options.ranks);
  RankOptions rank_options = options.rank;
  rank_options.loader_threads = std::max(1, options.rank.loader_threads / options.ranks);
  const auto load = [&](int r) {
    absl::StatusOr<std::unique_ptr<kernels::Backend>> backend = NewBackend(options, r);
    if (!backend.ok()) {
      loaded[r] = backend.status();
      return;
    }
    loaded[r] = Rank::Load(config, {.rank = r, .ranks = options.ranks}, checkpoint, rank_options, *std::move(backend),
                           std::move(collectives[r]));
  };
  std::vector<std::thread> loaders;
  for (int r = 1; r < options.ranks; ++r) loaders.emplace_back(load, r);
  load(0);
  for (std::thread& thread : loaders) thread.join();
  for (absl::StatusOr<std::unique_ptr<Rank>>& rank : loaded) {
    if (!rank.ok()) return rank.status();
    executor->ranks_.push_back(*std::move(rank));
  }
  if (absl::Status s = checkpoint.CheckUnchanged(); !s.ok()) return s;
  for (int r = 1; r < options.ranks; ++r) {
    executor->followers_.push_back(std::make_unique<Follower>());
    Follower& follower = *executor->followers_.back();
    follower.thread = std::thread([raw = executor.get(), &follower, rank = executor->ranks_[r].get()] { raw->Follow(follower, *rank); });
  }
  return executor;
}

Executor::~Executor() {
  Send(Task::kStop, nullptr);
  for (const std::unique_ptr<Follower>& follower : followers_) follower->thread.join();
}

void Executor::Send(Task task, std::shared_ptr<const Batch> batch) {
  for (const std::unique_ptr<Follower>& follower : followers_) {
    kernels::MutexLock lock(follower->mutex);
    follower->mailbox.push_back({task, batch, nullptr});
    follower->changed.NotifyOne();
  }
}

// The life of a follower's thread.
void Executor::Follow(Follower& follower, Rank& rank) {
  bool failed = false;
  while (true) {
    Mail mail;
    {
      kernels::MutexLock lock(follower.mutex);
      while (follower.mailbox.empty()) follower.changed.Wait(follower.mutex);
      mail = std::move(follower.mailbox.front());
      follower.mailbox.pop_front();
    }
    absl::Status status;
    if (mail.task == Task::kStop) return;
    if (mail.task == Task::kCall) mail.call(rank);  // also behind a failure: somebody waits
    if (failed) continue;
    if (mail.task == Task::kLaunch) status = rank.Execute(*mail.batch);
    if (mail.task == Task::kCollect) rank.Collect();
    if (mail.task == Task::kLogits) status = rank.ExecuteForLogits(*mail.batch).status();
    if (status.ok()) continue;
    rank.collective()->Abort();
    kernels::MutexLock lock(follower.mutex);
    follower.status = status;
    failed = true;
  }
}

void Executor::OnEachRank(const std::function<void(size_t index, Rank& rank)>& call) {
  kernels::Mutex mutex;
  kernels::CondVar changed;
  size_t left = followers_.size();
  for (size_t f = 0; f < followers_.size(); ++f) {
    kernels::MutexLock lock(followers_[f]->mutex);
    followers_[f]->mailbox.push_back({Task::kCall, nullptr, [&, f](Rank& rank) {
                                        call(f + 1, rank);
                                        kernels::MutexLock done(mutex);
                                        --left;
                                        changed.NotifyOne();
                                      }});
    followers_[f]->changed.NotifyOne();
  }
  call(0, *ranks_.front());
  kernels::MutexLock lock(mutex);
  while (left > 0) changed.Wait(mutex);
}

absl::StatusOr<std::vector<float>> Executor::ReadRows(int64_t table, bool experts, const std::vector<int32_t>& rows) {
  std::vector<absl::StatusOr<std::vector<float>>> parts(ranks_.size());
  OnEachRank([&](size_t r, Rank& rank) { parts[r] = rank.ReadRows(table, experts, rows); });
  const std::vector<int64_t>& widths = first_rank().model().value_tables()[table]->widths;
  std::vector<float> joined;
  for (const auto& part : parts) {
    if (!part.ok()) return part.status();
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t r = 0; r < parts.size(); ++r) {
      const auto begin = parts[r]->begin() + static_cast<int64_t>(i) * widths[r];
      joined.insert(joined.end(), begin, begin + widths[r]);
    }
  }
  return joined;
}

absl::Status Executor::FollowerStatus() {
  for (const std::unique_ptr<Follower>& follower : followers_) {
    kernels::MutexLock lock(follower->mutex);
    if (!follower->status.ok()) return follower->status;
  }
  return absl::OkStatus();
}

absl::Status Executor::Launch(const Batch& batch) {
  if (!followers_.empty()) Send(Task::kLaunch, std::make_shared<const Batch>(batch));
  absl::Status status = ranks_.front()->Execute(batch);
  if (!status.ok() && !followers_.empty()) ranks_.front()->collective()->Abort();
  return status.ok() ? FollowerStatus() : status;
}

absl::StatusOr<StepResult> Executor::Collect() {
  Send(Task::kCollect, nullptr);
  StepResult result = ranks_.front()->Collect();
  if (absl::Status s = FollowerStatus(); !s.ok()) return s;
  return result;
}

absl::StatusOr<std::vector<float>> Executor::ExecuteForLogits(const Batch& batch, StepResult* result) {
  if (!followers_.empty()) Send(Task::kLogits, std::make_shared<const Batch>(batch));
  absl::StatusOr<std::vector<float>> logits = ranks_.front()->ExecuteForLogits(batch, result);
  if (!logits.ok() && !followers_.empty()) ranks_.front()->collective()->Abort();
  return logits;
}

}  // namespace memserve::engine
