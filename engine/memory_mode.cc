#include "engine/memory_mode.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace memserve::engine {
namespace {

absl::Status Bad(absl::string_view field, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat("memory.", field, ": ", message));
}

bool Contains(const auto& list, int32_t value) { return std::find(list.begin(), list.end(), value) != list.end(); }

}  // namespace

std::string SequenceMemory::Key() const {
  return absl::StrCat("knn ", knn, " off ", absl::StrJoin(layers_off, ","), " masked ", absl::StrJoin(masked_rows, ","));
}

void SequenceMemory::AddTo(Batch& batch) const {
  const auto sequence = static_cast<int32_t>(batch.num_sequences());
  batch.memory_knn.push_back(knn);
  for (int32_t layer : layers_off) batch.layers_off.insert(batch.layers_off.end(), {sequence, layer});
  batch.masked_rows.insert(batch.masked_rows.end(), masked_rows.begin(), masked_rows.end());
  batch.masked_end.push_back(static_cast<int32_t>(batch.masked_rows.size()));
}

absl::Status Validate(const MemoryMode& mode, const MemoryConfig& config) {
  if (config.layers.empty()) {
    const char* given = mode.knn ? "knn" : !mode.layers.empty() ? "layers" : !mode.masked_rows.empty() ? "masked_rows" : nullptr;
    return given == nullptr ? absl::OkStatus() : Bad(given, "the model has no memory layers");
  }
  if (mode.knn && (*mode.knn < 1 || *mode.knn > config.mem_knn)) {
    return Bad("knn", absl::StrCat(*mode.knn, " is not in [1, ", config.mem_knn, "]"));
  }
  if (mode.layers.size() > config.layers.size()) {
    return Bad("layers", absl::StrCat("has ", mode.layers.size(), " entries; the model has ", config.layers.size(),
                                      " memory layers: ", absl::StrJoin(config.layers, ", ")));
  }
  for (int32_t layer : mode.layers) {
    if (Contains(config.layers, layer)) continue;
    return Bad("layers", absl::StrCat("layer ", layer, " has no memory; these do: ", absl::StrJoin(config.layers, ", ")));
  }
  if (mode.masked_rows.size() > kMaxMaskedRows) {
    return Bad("masked_rows", absl::StrCat("has ", mode.masked_rows.size(), " rows; at most ", kMaxMaskedRows, " are accepted"));
  }
  for (size_t i = 0; i < mode.masked_rows.size(); ++i) {
    if (mode.masked_rows[i] >= 0 && mode.masked_rows[i] < config.rows()) continue;
    return Bad("masked_rows", absl::StrCat("row ", mode.masked_rows[i], " at index ", i, " is not in [0, ", config.rows(), ")"));
  }
  return absl::OkStatus();
}

SequenceMemory Resolve(const MemoryMode& mode, const MemoryConfig& config) {
  SequenceMemory memory;
  if (!mode.enabled) return memory;
  memory.knn = mode.knn.value_or(config.mem_knn);
  for (size_t i = 0; i < config.layers.size() && !mode.layers.empty(); ++i) {
    if (!Contains(mode.layers, config.layers[i])) memory.layers_off.push_back(static_cast<int32_t>(i));
  }
  memory.masked_rows = mode.masked_rows;
  std::sort(memory.masked_rows.begin(), memory.masked_rows.end());
  memory.masked_rows.erase(std::unique(memory.masked_rows.begin(), memory.masked_rows.end()), memory.masked_rows.end());
  return memory;
}

}  // namespace memserve::engine
