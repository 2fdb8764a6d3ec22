#include "kernels/cpu/thread_pool.h"

#include <cfenv>
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace memserve::kernels::cpu {
namespace {

// Operations of one step follow each other within some tens of microseconds; waking a parked thread costs about as much.
constexpr std::chrono::microseconds kSpin{200};

// The parts of a word.
constexpr int kTaskBits = 20;
constexpr uint64_t kTaskMask = (uint64_t{1} << kTaskBits) - 1;
constexpr uint64_t NextTask(uint64_t word) { return word & kTaskMask; }
constexpr uint64_t Tasks(uint64_t word) { return word >> kTaskBits & kTaskMask; }
constexpr uint64_t Generation(uint64_t word) { return word >> (2 * kTaskBits); }
constexpr uint64_t Word(uint64_t generation, uint64_t tasks) { return (generation << kTaskBits | tasks) << kTaskBits; }
constexpr bool HasTask(uint64_t word) { return NextTask(word) < Tasks(word); }

inline void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Calls ready() until it holds or the time is over.
template <typename Ready>
bool SpinUntil(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int thread = 1; thread < threads; ++thread) {
    workers_.emplace_back([this, thread] { Work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  {
    MutexLock lock(mutex_);
    wake_.NotifyAll();
  }
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Share(int64_t tasks, Trampoline call, const void* context) {
  MEMSERVE_CHECK(tasks <= static_cast<int64_t>(kTaskMask));
  call_.store(call, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  word_.store(Word(Generation(word_.load(std::memory_order_relaxed)) + 1, tasks));
  if (parked_.load() > 0) {
    MutexLock lock(mutex_);
    wake_.NotifyAll();
  }
  TakeTasks(0);
  const auto all_done = [&] { return done_.load(std::memory_order_acquire) == tasks; };
  while (!SpinUntil(all_done)) std::this_thread::yield();
}

bool ThreadPool::HasTasks() const { return HasTask(word_.load()); }

bool ThreadPool::TakeTasks(int thread) {
  bool took = false;
  uint64_t word = word_.load(std::memory_order_acquire);
  while (HasTask(word)) {
    const Trampoline call = call_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    if (!word_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    call(context, static_cast<int64_t>(NextTask(word)), thread);
    took = true;
    done_.fetch_add(1, std::memory_order_acq_rel);
    word = word_.load(std::memory_order_acquire);
  }
  return took;
}

void ThreadPool::Work(int thread) {
  std::fesetenv(FE_DFL_ENV);
  const auto ready = [this] { return stopping_.load() || HasTasks(); };
  while (!stopping_) {
    if (TakeTasks(thread) || SpinUntil(ready)) continue;
    parked_.fetch_add(1);
    {
      MutexLock lock(mutex_);
      while (!ready()) wake_.Wait(mutex_);
    }
    parked_.fetch_sub(1);
  }
}

}  // namespace memserve::kernels::cpu
