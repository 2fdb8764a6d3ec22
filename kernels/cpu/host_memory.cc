#include "kernels/cpu/host_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace memserve::kernels::cpu {
namespace {

constexpr int64_t kMapped = 64 << 10;  // smaller blocks would waste their last page

// An anonymous mapping whose first byte lies on a huge page, or null.
std::shared_ptr<void> MapHuge(int64_t bytes) {
  const int64_t mapped = bytes + kHugePage;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(base) + kHugePage - 1) & ~uintptr_t{kHugePage - 1};
  madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);  // a kernel without them serves small pages
  return std::shared_ptr<void>(reinterpret_cast<void*>(aligned), [base, mapped](void*) { munmap(base, mapped); });
}

// Pages come to be as they are touched: of what is planned for the largest step most is never used.
std::shared_ptr<void> MapPages(int64_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  return std::shared_ptr<void>(base, [bytes](void* p) { munmap(p, bytes); });
}

std::shared_ptr<void> AlignedZeroes(int64_t bytes) {
  void* block = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (block == nullptr) return nullptr;
  std::memset(block, 0, bytes);
  return std::shared_ptr<void>(block, [](void* p) { std::free(p); });
}

}  // namespace

absl::StatusOr<HostMemory> HostMemory::Allocate(int64_t bytes, std::string_view purpose) {
  MEMSERVE_CHECK(bytes >= 0);
  // A kernel that overcommits would grant more than the machine has, and end the process later: asked first.
  const int64_t machine = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  HostMemory memory;
  if (bytes <= machine) {
    memory.block_ = bytes >= kHugePage  ? MapHuge(bytes + kReadAhead)
                    : bytes >= kMapped ? MapPages(bytes + kReadAhead)
                                       : AlignedZeroes(bytes + kReadAhead);
  }
  if (memory.block_ == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat(std::string(purpose), " needs ", bytes, " bytes of host memory; this machine has ", machine));
  }
  memory.bytes_ = bytes;
  return memory;
}

}  // namespace memserve::kernels::cpu
