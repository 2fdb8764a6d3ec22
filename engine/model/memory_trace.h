// Which rows fired: filled by a forward pass that is asked to. Host memory.
#pragma once

#include <cstdint>
#include <vector>

namespace memserve::engine {

struct MemoryTrace {
  struct Layer {
    int layer = 0;
    std::vector<int32_t> rows;    // [num_tokens, mem_heads, knn], -1 where fewer were kept
    std::vector<float> weights;   // beside them
  };
  std::vector<Layer> layers;  // one for each memory layer, in order
};

}  // namespace memserve::engine
