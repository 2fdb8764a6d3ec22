#include "engine/model/memory_layer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {

using kernels::TensorView;

MemoryScratch::MemoryScratch(const ModelConfig& config, const Shard& shard, kernels::DType table, int64_t max_tokens,
                             Workspace& workspace) {
  const MemoryConfig& memory = config.memory;
  const int64_t bag = int64_t{memory.mem_heads} * memory.mem_knn;
  const int64_t columns = shard.TableColumns(config.value_dim(), table).size();
  query = workspace.Take(max_tokens, int64_t{memory.mem_heads} * memory.mem_k_dim);
  scores = workspace.Take(max_tokens, bag);
  weights = workspace.Take(max_tokens, bag);
  rows = workspace.Take<int32_t>(max_tokens, bag);
  dots = memory.peer_variant ? workspace.Take(max_tokens, bag) : nullptr;
  pooled = workspace.Take(max_tokens, columns);
  gate = workspace.Take(max_tokens, std::max<int64_t>(1, columns));
}

absl::StatusOr<std::unique_ptr<MemoryLayer>> MemoryLayer::Load(const ModelConfig& config, const Shard& shard, int layer,
                                                               const ValueTable& table, WeightLoader& loader) {
  auto memory_layer = std::make_unique<MemoryLayer>();
  MemoryLayer& m = *memory_layer;
  const MemoryConfig& memory = config.memory;
  m.config_ = &config;
  m.place_ = static_cast<int>(std::find(memory.layers.begin(), memory.layers.end(), layer) - memory.layers.begin());
  m.table_ = &table;
  m.first_rank_ = shard.rank == 0;
  const std::string prefix = absl::StrCat("layers.", layer, ".feed_forward.");
  const int64_t query_dim = int64_t{memory.mem_heads} * memory.mem_k_dim;
  const int64_t value_dim = config.value_dim();
  const Range dim = {0, config.dim};
  LOAD_OR_RETURN(m.query_,
                 loader.LoadMatrix(prefix + "query_proj.query_mlps.0.weight", query_dim, config.dim, {0, query_dim}, dim));
  LOAD_OR_RETURN(m.query_bias_, loader.LoadVector(prefix + "query_proj.query_mlps.0.bias", query_dim, {0, query_dim}));
  if (memory.query_norm != MemoryConfig::QueryNorm::kNone) {
    const int64_t width = memory.query_norm_dim();
    LOAD_OR_RETURN(m.query_norm_, loader.LoadVector(prefix + "query_norm.weight", width, {0, width}));
    if (memory.query_norm == MemoryConfig::QueryNorm::kLayerNorm && loader.Has(prefix + "query_norm.bias")) {
      LOAD_OR_RETURN(m.query_norm_bias_, loader.LoadVector(prefix + "query_norm.bias", width, {0, width}));
    }
  }
  LOAD_OR_RETURN(m.half_keys_, loader.LoadMatrix(prefix + "keys", memory.mem_n_keys, memory.half_dim(), {0, memory.mem_n_keys},
                                                 {0, memory.half_dim()}, int64_t{memory.mem_heads} * 2));
  if (config.has_value_projection()) {
    LOAD_OR_RETURN(m.value_projection_, loader.LoadMatrix(prefix + "value_proj.weight", config.dim, value_dim, dim, table.columns));
    LOAD_OR_RETURN(m.value_bias_, loader.LoadVector(prefix + "value_proj.bias", config.dim, dim));
  }
  if (memory.swilu_projection && !memory.peer_variant) {
    LOAD_OR_RETURN(m.swilu_, loader.LoadMatrix(prefix + "swilu_projection.weight", value_dim, config.dim, table.columns, dim));
    LOAD_OR_RETURN(m.swilu_bias_, loader.LoadVector(prefix + "swilu_projection.bias", value_dim, table.columns));
  }
  if (memory.peer_variant) {  // present in such checkpoints, not part of the computation
    for (const char* part : {"value_proj.weight", "value_proj.bias", "swilu_projection.weight", "swilu_projection.bias"}) {
      loader.Ignore(prefix + part);
    }
  }
  if (memory.mem_gated) {
    LOAD_OR_RETURN(m.gating_, loader.LoadMatrix(prefix + "gating.weight", 1, config.dim, {0, 1}, dim));
    LOAD_OR_RETURN(m.gating_bias_, loader.LoadVector(prefix + "gating.bias", 1, {0, 1}));
  }
  return memory_layer;
}

void MemoryLayer::NormaliseQuery(const ForwardContext& context, TensorView<float, 2> query) const {
  const MemoryConfig& memory = config_->memory;
  const int64_t width = memory.query_norm_dim();
  const TensorView<float, 2> each(query.data, {query.size() / width, width});
  const float eps = static_cast<float>(memory.query_norm_eps);
  if (memory.query_norm == MemoryConfig::QueryNorm::kLayerNorm) {
    context.backend->LayerNorm({.x = each, .weight = query_norm_.view(), .bias = query_norm_bias_.view(), .eps = eps, .out = each});
  } else if (memory.query_norm == MemoryConfig::QueryNorm::kRmsNorm) {
    context.backend->RmsNorm({.x = each, .weight = query_norm_.view(), .eps = eps, .out = each});
  }
}

// rows and weights of the best product keys that are not masked.
void MemoryLayer::Search(const ForwardContext& context, const MemoryScratch& scratch, TensorView<const float, 2> x) const {
  const MemoryConfig& memory = config_->memory;
  const int64_t tokens = context.num_tokens;
  const TensorView<float, 2> query(scratch.query, {tokens, int64_t{memory.mem_heads} * memory.mem_k_dim});
  const std::array<int64_t, 3> found = {tokens, memory.mem_heads, memory.mem_knn};
  context.backend->MatMul({.x = x, .weight = query_.get(), .bias = query_bias_.view(), .out = query});
  NormaliseQuery(context, query);
  context.backend->ProductKeySearch({.query = {query.data, {tokens, memory.mem_heads, 2, memory.half_dim()}},
                                     .half_keys = half_keys_.get(),
                                     .knn_of_token = context.KnnOf(place_),
                                     .scores = {scratch.scores, found},
                                     .weights = {scratch.weights, found},
                                     .rows = {scratch.rows, found}});
  if (context.masked_rows.empty()) return;
  const std::array<int64_t, 2> bags = {tokens, found[1] * found[2]};
  context.backend->MaskRows({.sequence = context.sequence,
                             .masked_end = context.masked_end,
                             .masked = context.masked_rows,
                             .rows = {scratch.rows, bags},
                             .weights = {scratch.weights, bags}});
}

// What the traced tokens read, before PEER scales the weights.
void MemoryLayer::Trace(const ForwardContext& context, const MemoryScratch& scratch) const {
  const int64_t traced = context.traced_tokens.size(), bag = int64_t{config_->memory.mem_heads} * config_->memory.mem_knn;
  const int64_t offset = place_ * traced * bag;
  context.backend->SelectBags({.tokens = context.traced_tokens,
                               .rows = {scratch.rows, {context.num_tokens, bag}},
                               .weights = {scratch.weights, {context.num_tokens, bag}},
                               .out_rows = {context.trace_rows + offset, {traced, bag}},
                               .out_weights = {context.trace_weights + offset, {traced, bag}}});
}

// PEER: weight *= gelu(u[row] · x).
void MemoryLayer::ScaleByExperts(const ForwardContext& context, const MemoryScratch& scratch, TensorView<const float, 2> x) const {
  const std::array<int64_t, 2> bags = {context.num_tokens, int64_t{config_->memory.mem_heads} * config_->memory.mem_knn};
  const TensorView<float, 2> dots(scratch.dots, bags);
  context.backend->RowDot({.table = table_->values_u.get(), .rows = {scratch.rows, bags}, .x = x, .out = dots});
  if (context.collective != nullptr) context.collective->AllReduce(dots);
  context.backend->GeluScale({.dots = dots, .weights = {scratch.weights, bags}});
}

absl::Status MemoryLayer::Forward(const ForwardContext& context, const MemoryScratch& scratch, TensorView<const float, 2> x,
                                  TensorView<float, 2> out) const {
  kernels::Backend& backend = *context.backend;
  const MemoryConfig& memory = config_->memory;
  const int64_t tokens = context.num_tokens;
  const bool split = context.collective != nullptr;
  // Where nothing follows the gather and one rank holds all columns, it writes to `out` itself.
  const bool direct = !split && value_projection_ == nullptr;
  const TensorView<float, 2> pooled(direct ? out.data : scratch.pooled, {tokens, table_->columns.size()});

  Search(context, scratch, x);
  if (!context.traced_tokens.empty()) Trace(context, scratch);
  const std::array<int64_t, 2> bags = {tokens, int64_t{memory.mem_heads} * memory.mem_knn};
  if (table_->counts != nullptr)
    backend.CountRows({.rows = TensorView<int32_t, 2>(scratch.rows, bags), .counts = {table_->counts, {table_->rows}}});
  if (memory.peer_variant) ScaleByExperts(context, scratch, x);

  const kernels::RowStore::Ticket ticket = table_->values->Start(
      {.table = table_->values.get(), .rows = {scratch.rows, bags}, .weights = {scratch.weights, bags}, .out = pooled});
  const TensorView<float, 2> gate(scratch.gate, {tokens, table_->columns.size()});
  if (swilu_ != nullptr) backend.MatMul({.x = x, .weight = swilu_.get(), .bias = swilu_bias_.view(), .out = gate});
  if (absl::Status s = table_->values->Finish(ticket); !s.ok()) return s;

  if (swilu_ != nullptr) backend.SiluProduct({.a = gate, .b = pooled, .out = pooled});
  if (value_projection_ != nullptr) {
    const TensorView<const float, 1> bias = first_rank_ ? value_bias_.view() : TensorView<const float, 1>();
    backend.MatMul({.x = pooled, .weight = value_projection_.get(), .bias = bias, .out = out});
    if (split) context.collective->AllReduce(out);
  } else if (split) {
    context.collective->AllGather(pooled, table_->widths, out);
  }
  if (gating_ != nullptr) {
    const TensorView<float, 2> gating(scratch.gate, {tokens, 1});
    backend.MatMul({.x = x, .weight = gating_.get(), .bias = gating_bias_.view(), .out = gating});
    backend.SigmoidGate({.gate = gating, .x = out});
  }
  return absl::OkStatus();
}

}  // namespace memserve::engine
