// What the memory layers do for one sequence: checked, and made ready for batches.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/batch.h"
#include "engine/model/config.h"
#include "engine/request.h"

namespace memserve::engine {

struct SequenceMemory {
  int32_t knn = 0;                   // rows per memory head; 0: off
  std::vector<int32_t> layers_off;   // by their place among the memory layers; ascending
  std::vector<int32_t> masked_rows;  // ascending, each once

  // Equal where keys and values of all layers are.
  std::string Key() const;
  // Appends what the next sequence of the batch does.
  void AddTo(Batch& batch) const;
};

// INVALID_ARGUMENT names field, value and limit. `config.layers` empty: the model has no memory.
absl::Status Validate(const MemoryMode& mode, const MemoryConfig& config);
// Of a mode that is valid.
SequenceMemory Resolve(const MemoryMode& mode, const MemoryConfig& config);

}  // namespace memserve::engine
