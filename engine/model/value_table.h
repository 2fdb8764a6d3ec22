// Which memory layers share which rows. The model's value tables are found, counted and held once, however many layers read them and
// however many of them list a copy in the checkpoint; where a row lives is the RowStore's affair.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/shard.h"
#include "kernels/row_store.h"

namespace memserve::engine {

// Columns of one table on this rank. PEER has two stores (u and v), the others one.
struct ValueTable {
  std::string tensor;        // of `values`, its name in the checkpoint
  std::vector<int> layers;   // that read it
  int64_t rows = 0;
  int64_t dim = 0;
  Range columns;             // of this rank
  std::vector<int64_t> widths;  // columns of each rank
  std::shared_ptr<kernels::RowStore> values;    // null while planning
  std::shared_ptr<kernels::RowStore> values_u;  // PEER only: what the token's vector is multiplied with
  uint32_t* counts = nullptr;                   // [rows], on the device: how often each was read; null: not counted
};

// Loads the tables of all memory layers: one for all with mem_share_values, else one each. A shared table may be listed under any or
// all of its layers; copies are checked to begin alike and are not loaded. INVALID_ARGUMENT also if there are more ranks than column
// groups.
absl::StatusOr<std::vector<std::unique_ptr<ValueTable>>> LoadValueTables(const ModelConfig& config, const Shard& shard,
                                                                         const Checkpoint& checkpoint, WeightLoader& loader);

}  // namespace memserve::engine
