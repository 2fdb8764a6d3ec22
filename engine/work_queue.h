// Tasks for a few threads of their own, run in the order they were added (with one thread, one after the other).
#pragma once

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/sync.h"

namespace memserve::engine {

// Thread-safe. The destructor runs what is still queued.
class WorkQueue {
 public:
  explicit WorkQueue(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
  }
  ~WorkQueue() {
    {
      kernels::MutexLock lock(mutex_);
      closing_ = true;
      changed_.NotifyAll();
    }
    for (std::thread& thread : threads_) thread.join();
  }

  void Add(std::function<void()> task) {
    kernels::MutexLock lock(mutex_);
    tasks_.push_back(std::move(task));
    changed_.NotifyOne();
  }

 private:
  void Run() {
    while (true) {
      std::function<void()> task;
      {
        kernels::MutexLock lock(mutex_);
        while (tasks_.empty() && !closing_) changed_.Wait(mutex_);
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  kernels::Mutex mutex_;
  kernels::CondVar changed_;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mutex_);
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace memserve::engine
