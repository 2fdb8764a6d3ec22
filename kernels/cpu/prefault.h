// Has the kernel back memory before it is used: the first touch of a huge page takes milliseconds, and the keys and values of all
// layers reach their next one in the same step.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace memserve::kernels::cpu {

class Prefault {
 public:
  // Goes through all ranges [address, bytes) side by side from their beginnings, on a thread of low priority. What is in them
  // stays. Memory that is gone meanwhile does no harm.
  explicit Prefault(std::vector<std::pair<void*, int64_t>> ranges);
  ~Prefault();  // stops

 private:
  void Run(const std::vector<std::pair<void*, int64_t>>& ranges) const;

  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace memserve::kernels::cpu
