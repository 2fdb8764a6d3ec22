#include <cstdlib>

#include "absl/strings/str_cat.h"
#include <unistd.h>

#include "kernels/reference/reference.h"

namespace memserve::kernels::reference {

absl::StatusOr<DeviceBuffer> AllocateHost(int64_t bytes, std::string_view purpose) {
  MEMSERVE_CHECK(bytes >= 0);
  // calloc gives lazily zeroed pages, and may promise more than the machine has: asked first.
  const int64_t machine = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  void* address = bytes <= machine ? std::calloc(1, bytes > 0 ? bytes : 1) : nullptr;
  if (address == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat(std::string(purpose), " needs ", bytes,
                                                     " bytes of host memory; this machine has ", machine));
  }
  return DeviceBuffer(address, bytes, std::shared_ptr<void>(address, std::free));
}

}  // namespace memserve::kernels::reference
