#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
  memserve::fuzz::GenerationConfig(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}
