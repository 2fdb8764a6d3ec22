// Tasks for a few threads of their own, run in the order they were added (with one thread, one after the other).
//
// With a `rest`, a thread takes all that is there at once and then takes nothing for so long: tasks that come faster are run
// together, and who adds them need not wake anybody. A task that comes later than that after the last one is run at once.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/sync.h"

namespace memserve::engine {

// Thread-safe. The destructor runs what is still queued.
class WorkQueue {
 public:
  explicit WorkQueue(int threads, std::chrono::microseconds rest = std::chrono::microseconds(0)) : rest_(rest) {
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
    if (waiting_ > 0) changed_.NotifyOne();
  }

 private:
  void Run() {
    while (true) {
      std::deque<std::function<void()>> tasks;
      bool closing = false;
      {
        kernels::MutexLock lock(mutex_);
        while (tasks_.empty() && !closing_) {
          ++waiting_;
          changed_.Wait(mutex_);
          --waiting_;
        }
        if (tasks_.empty()) return;
        closing = closing_;
        if (rest_.count() > 0) {
          tasks.swap(tasks_);
        } else {
          tasks.push_back(std::move(tasks_.front()));
          tasks_.pop_front();
        }
      }
      const auto begin = std::chrono::steady_clock::now();
      for (const std::function<void()>& task : tasks) task();
      if (rest_.count() > 0 && !closing) std::this_thread::sleep_until(begin + rest_);
    }
  }

  const std::chrono::microseconds rest_;
  kernels::Mutex mutex_;
  kernels::CondVar changed_;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mutex_);
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  int waiting_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<std::thread> threads_;
};

}  // namespace memserve::engine
