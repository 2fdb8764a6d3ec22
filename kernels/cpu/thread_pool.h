// Persistent threads for the operations of one back end. The caller takes part; with one thread there are no workers at all.
//
// Workers leave the floating-point environment at its default (no flush to zero), whatever the creating thread has set.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/check.h"
#include "kernels/sync.h"

namespace memserve::kernels::cpu {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls fn(task, thread) once for each task in [0, tasks), threads in [0, size()); returns when all are done. `cost_ns` is an
  // estimate of all the work on one thread: below kWorthSharingNs the caller does it alone, without a lock or a wake-up.
  // One caller at a time; fn must not call ParallelFor.
  template <typename Fn>
  void ParallelFor(int64_t tasks, double cost_ns, const Fn& fn) {
    if (tasks <= 1 || workers_.empty() || cost_ns < kWorthSharingNs) {
      for (int64_t task = 0; task < tasks; ++task) fn(task, 0);
      return;
    }
    Share(
        tasks, [](const void* context, int64_t task, int thread) { (*static_cast<const Fn*>(context))(task, thread); }, &fn);
  }

  static constexpr double kWorthSharingNs = 15000;

 private:
  using Trampoline = void (*)(const void* context, int64_t task, int thread);

  void Share(int64_t tasks, Trampoline call, const void* context);
  void Work(int thread);
  bool TakeTasks(int thread);
  bool HasTasks() const;

  // What runs now, in one cache line. The word holds generation, number of tasks and next task; a task is taken by
  // compare-and-swap. The job of a word with tasks left cannot end before they are taken, so what was read of `call_` and
  // `context_` after the word belongs to it if the swap succeeds: a worker that comes late never mixes two jobs.
  alignas(64) std::atomic<uint64_t> word_{0};
  std::atomic<Trampoline> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<int64_t> done_{0};

  alignas(64) std::atomic<int> parked_{0};
  Mutex mutex_;
  CondVar wake_;
  std::vector<std::thread> workers_;
};

}  // namespace memserve::kernels::cpu
