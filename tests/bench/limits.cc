#include "tests/bench/limits.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/bench/limits.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)  // as in kernels/cpu
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace memserve::bench::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::ScalableTag<float>;

// Twelve chains hide the latency of a multiply-add: 4 cycles, two a cycle. Each starts elsewhere, or the compiler would keep one.
double MultiplyAdds(int64_t rounds) {
  constexpr int kChains = 12;
  static volatile float start = 1;
  const Tag d;
  const auto a = hn::Set(d, 0.999f), b = hn::Set(d, 0.001f);
  const auto next = [&d] { return hn::Set(d, start); };
  auto c0 = next(), c1 = next(), c2 = next(), c3 = next(), c4 = next(), c5 = next();
  auto c6 = next(), c7 = next(), c8 = next(), c9 = next(), c10 = next(), c11 = next();
  for (int64_t round = 0; round < rounds; ++round) {
    c0 = hn::MulAdd(c0, a, b), c1 = hn::MulAdd(c1, a, b), c2 = hn::MulAdd(c2, a, b), c3 = hn::MulAdd(c3, a, b);
    c4 = hn::MulAdd(c4, a, b), c5 = hn::MulAdd(c5, a, b), c6 = hn::MulAdd(c6, a, b), c7 = hn::MulAdd(c7, a, b);
    c8 = hn::MulAdd(c8, a, b), c9 = hn::MulAdd(c9, a, b), c10 = hn::MulAdd(c10, a, b), c11 = hn::MulAdd(c11, a, b);
  }
  c0 = hn::Add(hn::Add(hn::Add(c0, c1), hn::Add(c2, c3)), hn::Add(hn::Add(c4, c5), hn::Add(c6, c7)));
  c0 = hn::Add(c0, hn::Add(hn::Add(c8, c9), hn::Add(c10, c11)));
  [[maybe_unused]] static volatile float sink;  // so that the sums are not dropped
  sink = hn::GetLane(c0);
  return 2.0 * kChains * static_cast<double>(hn::Lanes(d)) * static_cast<double>(rounds);
}

void Read(const float* begin, const float* end) {
  const Tag d;
  const int64_t step = hn::Lanes(d);
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  for (; begin + 4 * step <= end; begin += 4 * step) {
    s0 = hn::Add(s0, hn::Load(d, begin)), s1 = hn::Add(s1, hn::Load(d, begin + step));
    s2 = hn::Add(s2, hn::Load(d, begin + 2 * step)), s3 = hn::Add(s3, hn::Load(d, begin + 3 * step));
  }
  [[maybe_unused]] static volatile float sink;
  sink = hn::GetLane(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
}

}  // namespace memserve::bench::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace memserve::bench {
namespace {

HWY_EXPORT(MultiplyAdds);
HWY_EXPORT(Read);

// Each thread on a core of its own, where there are enough: two that spin on one core would measure half of it.
void Pin(int thread) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || seen++ != thread) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof(one), &one);
    return;
  }
}

// The largest amount(thread, try) of all threads per second, over many short tries: what else runs here only ever takes away.
double BestRate(int threads, const std::function<double(int, int)>& amount) {
  using Clock = std::chrono::steady_clock;
  struct Part {
    double amount;
    Clock::time_point begin, end;
  };
  constexpr int kMostTries = 2000;
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(1);
  std::vector<std::vector<Part>> parts(kMostTries, std::vector<Part>(threads));
  std::atomic<int> arrived{0}, tries{kMostTries};
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      Pin(thread);
      for (int attempt = 0; attempt < tries; ++attempt) {
        if (thread == 0 && Clock::now() > deadline) tries = attempt + 1;
        ++arrived;
        while (arrived < threads * (attempt + 1)) {
        }  // spins: whoever sleeps starts late
        Part& part = parts[attempt][thread];
        part.begin = Clock::now();
        part.amount = amount(thread, attempt);
        part.end = Clock::now();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  parts.resize(tries);
  double best = 0;
  for (const std::vector<Part>& together : parts) {
    double total = 0;
    Clock::time_point begin = together[0].begin, end = together[0].end;
    for (const Part& part : together) {
      total += part.amount;
      begin = std::min(begin, part.begin);
      end = std::max(end, part.end);
    }
    best = std::max(best, total / std::chrono::duration<double>(end - begin).count());
  }
  return best;
}

double MeasureRead(int threads) {
  constexpr int64_t kBytes = int64_t{512} << 20;  // far more than the caches hold: a piece is cold when its turn comes again
  constexpr int64_t kPieces = 16;
  constexpr int64_t kHugePage = int64_t{2} << 20;
  void* mapped = mmap(nullptr, kBytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return 0;
  const auto aligned = (reinterpret_cast<uintptr_t>(mapped) + kHugePage - 1) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(aligned), kBytes, MADV_HUGEPAGE);
  float* const values = reinterpret_cast<float*>(aligned);
  constexpr int64_t kPiece = kBytes / kPieces / static_cast<int64_t>(sizeof(float));
  std::fill(values, values + kPieces * kPiece, 1.0f);
  const double best = BestRate(threads, [&](int thread, int attempt) {
    const float* piece = values + attempt % kPieces * kPiece;
    const auto place = [&](int of) { return kPiece / 1024 * of / threads * 1024; };
    HWY_DYNAMIC_DISPATCH(Read)(piece + place(thread), piece + place(thread + 1));
    return static_cast<double>((place(thread + 1) - place(thread)) * static_cast<int64_t>(sizeof(float)));
  });
  munmap(mapped, kBytes + kHugePage);
  return best;
}

double MeasureMultiplyAdds(int threads) {
  return BestRate(threads, [](int, int) { return HWY_DYNAMIC_DISPATCH(MultiplyAdds)(400'000); });
}

}  // namespace

Limits MeasureLimits(int threads) { return {MeasureRead(threads), MeasureMultiplyAdds(threads)}; }

}  // namespace memserve::bench
#endif
