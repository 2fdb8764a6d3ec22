// Host memory as the kernels want it: zeroed, aligned to cache lines, and large blocks on huge pages (a random row read is 1.3 to
// 1.6 times faster with them). Every block is followed by kReadAhead readable bytes, so that whole vectors may be loaded at its
// end.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"

namespace memserve::kernels::cpu {

inline constexpr int64_t kReadAhead = 64;
inline constexpr int64_t kHugePage = int64_t{2} << 20;

class HostMemory {
 public:
  // RESOURCE_EXHAUSTED names purpose and bytes.
  static absl::StatusOr<HostMemory> Allocate(int64_t bytes, std::string_view purpose);

  template <typename T>
  T* as() const {
    return static_cast<T*>(block_.get());
  }
  int64_t bytes() const { return bytes_; }
  bool huge_pages() const { return bytes_ >= kHugePage; }
  std::shared_ptr<void> owner() const { return block_; }

 private:
  std::shared_ptr<void> block_;
  int64_t bytes_ = 0;
};

}  // namespace memserve::kernels::cpu
