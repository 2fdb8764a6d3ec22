#include "engine/model/value_table.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {
namespace {

std::string TensorName(int layer, const std::string& part) { return absl::StrCat("layers.", layer, ".feed_forward.", part, ".weight"); }
// Of the rows' scales, where they are quantised.
std::string ScaleName(int layer, const std::string& part) { return absl::StrCat("layers.", layer, ".feed_forward.", part, ".scale"); }

// Where the table of `layers` is listed first; the first layer's name if nowhere (and then loading says that it is missing).
int OwnerOf(const std::vector<int>& layers, const std::string& part, const WeightLoader& loader) {
  for (int layer : layers) {
    if (loader.Has(TensorName(layer, part))) return layer;
  }
  return layers.front();
}

// A table listed under several layers must be the same one: compares shape, type and some bytes at begin, middle and end.
absl::Status CheckCopy(const Checkpoint& checkpoint, const std::string& owner, const std::string& copy) {
  const TensorInfo* a = checkpoint.Find(owner);
  const TensorInfo* b = checkpoint.Find(copy);
  bool equal = a->shape == b->shape && a->dtype == b->dtype;
  constexpr int64_t kProbeBytes = 4096;
  for (int i = 0; i < 3 && equal; ++i) {
    const int64_t bytes = std::min(kProbeBytes, a->bytes);
    const int64_t begin = (a->bytes - bytes) / 2 * i;
    std::vector<char> left(bytes), right(bytes);
    if (absl::Status s = checkpoint.Read(*a, begin, bytes, left.data()); !s.ok()) return s;
    if (absl::Status s = checkpoint.Read(*b, begin, bytes, right.data()); !s.ok()) return s;
    equal = left == right;
  }
  if (equal) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(checkpoint.folder(), ": tensors '", owner, "' and '", copy,
                                                 "' differ, but config.json says mem_share_values: they must be copies"));
}

absl::StatusOr<std::shared_ptr<kernels::RowStore>> LoadPart(const std::string& part, const ModelConfig& config, ValueTable& table,
                                                            const Checkpoint& checkpoint, WeightLoader& loader) {
  const int owner = OwnerOf(table.layers, part, loader);
  const std::string name = TensorName(owner, part);
  std::shared_ptr<kernels::RowStore> store;
  LOAD_OR_RETURN(store, loader.LoadRows(name, ScaleName(owner, part), table.rows, table.dim, table.columns));
  if (table.tensor.empty()) table.tensor = name;
  for (int layer : table.layers) {
    const std::string copy = TensorName(layer, part);
    if (layer == owner || !loader.Has(copy)) continue;
    if (loader.planning()) {
      if (absl::Status s = CheckCopy(checkpoint, name, copy); !s.ok()) return s;
      const std::string scale = ScaleName(owner, part), scale_copy = ScaleName(layer, part);
      if (loader.Has(scale) && loader.Has(scale_copy)) {
        if (absl::Status s = CheckCopy(checkpoint, scale, scale_copy); !s.ok()) return s;
      }
    }
    loader.Ignore(copy);
    loader.Ignore(ScaleName(layer, part));
  }
  return store;
}

absl::StatusOr<std::unique_ptr<ValueTable>> LoadTable(std::vector<int> layers, const ModelConfig& config, const Shard& shard,
                                                      const Checkpoint& checkpoint, WeightLoader& loader) {
  auto table = std::make_unique<ValueTable>();
  table->layers = std::move(layers);
  table->rows = config.memory.rows();
  table->dim = config.value_dim();
  table->columns = shard.TableColumns(table->dim, loader.types().table);
  table->widths = shard.TableWidths(table->dim, loader.types().table);
  if (*std::min_element(table->widths.begin(), table->widths.end()) == 0) {
    return absl::InvalidArgumentError(absl::StrCat("devices: ", shard.ranks, " were given; the value table is ", table->dim,
                                                   " wide and can be split over at most ",
                                                   (kernels::RowBytes(loader.types().table, table->dim) + 15) / 16));
  }
  if (config.memory.peer_variant) {
    LOAD_OR_RETURN(table->values_u, LoadPart("values_u", config, *table, checkpoint, loader));
    LOAD_OR_RETURN(table->values, LoadPart("values_v", config, *table, checkpoint, loader));
  } else {
    LOAD_OR_RETURN(table->values, LoadPart("values", config, *table, checkpoint, loader));
  }
  return table;
}

}  // namespace

absl::StatusOr<std::vector<std::unique_ptr<ValueTable>>> LoadValueTables(const ModelConfig& config, const Shard& shard,
                                                                         const Checkpoint& checkpoint, WeightLoader& loader) {
  std::vector<std::vector<int>> owners;
  if (config.memory.mem_share_values) {
    if (!config.memory.layers.empty()) owners.push_back(config.memory.layers);
  } else {
    for (int layer : config.memory.layers) owners.push_back({layer});
  }
  std::vector<std::unique_ptr<ValueTable>> tables;
  for (const std::vector<int>& layers : owners) {
    LOAD_OR_RETURN(std::unique_ptr<ValueTable> table, LoadTable(layers, config, shard, checkpoint, loader));
    tables.push_back(std::move(table));
  }
  return tables;
}

}  // namespace memserve::engine
