#include "kernels/cpu/prefault.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>

#include "kernels/cpu/host_memory.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older kernels refuse it, and pages come to be as they are touched
#endif

namespace memserve::kernels::cpu {

Prefault::Prefault(std::vector<std::pair<void*, int64_t>> ranges) : thread_([this, ranges = std::move(ranges)] { Run(ranges); }) {}

Prefault::~Prefault() {
  stop_ = true;
  thread_.join();
}

void Prefault::Run(const std::vector<std::pair<void*, int64_t>>& ranges) const {
  setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), 10);
  const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  int64_t most = 0;
  for (const auto& [address, bytes] : ranges) most = std::max(most, bytes);
  for (int64_t at = 0; at < most; at += kHugePage) {
    for (const auto& [address, bytes] : ranges) {
      if (stop_) return;
      if (at >= bytes) continue;
      const auto begin = (reinterpret_cast<uintptr_t>(address) + at) / page * page;
      const auto end = reinterpret_cast<uintptr_t>(address) + std::min(bytes, at + kHugePage);
      if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE) != 0) return;
    }
  }
}

}  // namespace memserve::kernels::cpu
