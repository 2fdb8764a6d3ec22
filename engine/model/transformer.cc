#include "engine/model/transformer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {
namespace {

using kernels::TensorView;

// Logits are made for so many rows and bytes at a time: prompt scores of a large vocabulary would not fit otherwise, and 64 rows fill
// a product as well as more.
constexpr int64_t kLogitRows = 64;
constexpr int64_t kLogitBytes = 32 << 20;

}  // namespace

absl::StatusOr<Transformer::Layer> Transformer::LoadLayer(const ModelConfig& config, const Shard& shard, int layer,
                                                          const std::vector<std::unique_ptr<ValueTable>>& tables,
                                                          WeightLoader& loader) {
  Layer loaded;
  const std::string prefix = absl::StrCat("layers.", layer, ".");
  const Range all = {0, config.dim};
  LOAD_OR_RETURN(loaded.attention_norm, loader.LoadVector(prefix + "attention_norm.weight", config.dim, all));
  LOAD_OR_RETURN(loaded.ffn_norm, loader.LoadVector(prefix + "ffn_norm.weight", config.dim, all));
  LOAD_OR_RETURN(loaded.attention, Attention::Load(config, shard, layer, loader));
  if (!config.IsMemoryLayer(layer)) {
    LOAD_OR_RETURN(loaded.feed_forward, FeedForward::Load(config, shard, layer, loader));
    return loaded;
  }
  const auto table = std::find_if(tables.begin(), tables.end(), [&](const auto& t) {
    return std::find(t->layers.begin(), t->layers.end(), layer) != t->layers.end();
  });
  MEMSERVE_CHECK(table != tables.end());
  LOAD_OR_RETURN(loaded.memory, MemoryLayer::Load(config, shard, layer, **table, loader));
  return loaded;
}

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Load(const ModelConfig& config, const Shard& shard,
                                                               const Checkpoint& checkpoint, const ModelLimits& limits,
                                                               WeightLoader& loader, Workspace& workspace,
                                                               kernels::Backend* backend) {
  auto model = std::make_unique<Transformer>();
  model->config_ = &config;
  model->shard_ = shard;
  const Range dim = {0, config.dim};
  const Range vocabulary = shard.Vocabulary(config);
  LOAD_OR_RETURN(model->embedding_,
                 loader.LoadMatrix("tok_embeddings.weight", config.vocab_size, config.dim, {0, config.vocab_size}, dim));
  if (!config.weight_tying || shard.ranks > 1) {
    const char* name = config.weight_tying ? "tok_embeddings.weight" : "output.weight";
    LOAD_OR_RETURN(model->output_, loader.LoadMatrix(name, config.vocab_size, config.dim, vocabulary, dim));
  }
  if (config.weight_tying) loader.Ignore("output.weight");  // a copy of the embedding
  LOAD_OR_RETURN(model->norm_, loader.LoadVector("norm.weight", config.dim, dim));
  LOAD_OR_RETURN(model->tables_, LoadValueTables(config, shard, checkpoint, loader));
  for (int layer = 0; layer < config.n_layers; ++layer) {
    LOAD_OR_RETURN(Layer loaded, LoadLayer(config, shard, layer, model->tables_, loader));
    model->layers_.push_back(std::move(loaded));
  }

  // All ranks search alike: one counts.
  for (const std::unique_ptr<ValueTable>& table : model->tables_) {
    if (!limits.count_rows || shard.rank != 0) continue;
    table->counts = workspace.Take<uint32_t>(table->rows, 1);
    model->count_bytes_ += table->rows * static_cast<int64_t>(sizeof(uint32_t));
  }

  const int64_t tokens = limits.max_tokens;
  model->max_tokens_ = tokens;
  model->rope_ = MakeRopeTables(config, limits.max_positions, backend, workspace);
  model->attention_scratch_ = std::make_unique<AttentionScratch>(config, shard, tokens, workspace);
  model->feed_forward_scratch_ = std::make_unique<FeedForwardScratch>(config, shard, tokens, workspace);
  if (!config.memory.layers.empty()) {
    model->memory_scratch_ = std::make_unique<MemoryScratch>(config, shard, loader.types().table, tokens, workspace);
  }
  model->x_ = workspace.Take(tokens, config.dim);
  model->normed_ = workspace.Take(tokens, config.dim);
  model->delta_ = workspace.Take(tokens, config.dim);
  model->max_logit_rows_ = std::clamp<int64_t>(kLogitBytes / (int64_t{config.vocab_size} * sizeof(float)), 1, std::min(kLogitRows, tokens));
  model->selected_ = workspace.Take(model->max_logit_rows_, config.dim);
  if (shard.ranks > 1) model->local_logits_ = workspace.Take(model->max_logit_rows_, vocabulary.size());
  if (!workspace.status().ok()) return workspace.status();
  return model;
}

absl::Status Transformer::Forward(const ForwardContext& context, const TokenInput& input,
                                  const std::vector<kernels::KvPages>& pages) const {
  kernels::Backend& backend = *context.backend;
  const std::array<int64_t, 2> shape = {context.num_tokens, config_->dim};
  const TensorView<float, 2> x(x_, shape);
  const TensorView<float, 2> normed(normed_, shape);
  const TensorView<float, 2> delta(delta_, shape);
  const float eps = static_cast<float>(config_->norm_eps);

  backend.Embedding({.token_ids = input.token_ids,
                     .from_slot = input.from_slot,
                     .sampled = input.sampled,
                     .weight = embedding_.get(),
                     .out = x});
  TensorView<const float, 2> last_delta;              // nothing to add before the first block
  TensorView<const int32_t, 1> last_on;               // which tokens it is added for; absent: all
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    backend.RmsNorm(
        {.x = x, .delta = last_delta, .delta_on = last_on, .weight = layer.attention_norm.view(), .eps = eps, .out = normed});
    layer.attention->Forward(context, rope_, *attention_scratch_, pages[i], normed, delta);
    backend.RmsNorm({.x = x, .delta = delta, .weight = layer.ffn_norm.view(), .eps = eps, .out = normed});
    // What is off for all is not computed, but where it is to be told that nothing fired.
    if (layer.memory != nullptr && !context.memory_on[layer.memory->place()] && context.traced_tokens.empty()) {
      last_delta = {};
      last_on = {};
      continue;
    }
    if (layer.memory != nullptr) {
      if (absl::Status s = layer.memory->Forward(context, *memory_scratch_, normed, delta); !s.ok()) return s;
    } else {
      layer.feed_forward->Forward(context, *feed_forward_scratch_, normed, delta);
    }
    last_delta = delta;
    last_on = layer.memory != nullptr ? context.KnnOf(layer.memory->place()) : TensorView<const int32_t, 1>();
  }
  backend.RmsNorm({.x = x, .delta = last_delta, .delta_on = last_on, .weight = norm_.view(), .eps = eps});
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Transformer::ReadRows(kernels::Backend& backend, int64_t table, bool experts,
                                                         absl::Span<const int32_t> rows) const {
  kernels::RowStore& store = experts ? *tables_[table]->values_u : *tables_[table]->values;
  const int64_t columns = store.spec().columns(), count = static_cast<int64_t>(rows.size());
  const MemoryScratch& scratch = *memory_scratch_;
  std::vector<float> values(count * columns);
  // Sums of one row each, of weight 1.
  const std::vector<float> ones(max_tokens_, 1.0f);
  for (int64_t begin = 0; begin < count; begin += max_tokens_) {
    const int64_t bags = std::min(max_tokens_, count - begin);
    backend.CopyToDevice(scratch.rows, rows.data() + begin, bags * static_cast<int64_t>(sizeof(int32_t)));
    backend.CopyToDevice(scratch.weights, ones.data(), bags * static_cast<int64_t>(sizeof(float)));
    const kernels::RowStore::Ticket ticket = store.Start({.table = &store,
                                                          .rows = TensorView<int32_t, 2>(scratch.rows, {bags, 1}),
                                                          .weights = TensorView<float, 2>(scratch.weights, {bags, 1}),
                                                          .out = {scratch.pooled, {bags, columns}}});
    if (absl::Status s = store.Finish(ticket); !s.ok()) return s;
    backend.Wait(backend.Record());
    backend.CopyToHost(values.data() + begin * columns, scratch.pooled, bags * columns * static_cast<int64_t>(sizeof(float)));
  }
  return values;
}

void Transformer::Logits(const ForwardContext& context, TensorView<const int32_t, 1> rows, TensorView<float, 2> logits) const {
  kernels::Backend& backend = *context.backend;
  const int64_t slots = rows.size();
  const TensorView<float, 2> selected(selected_, {slots, config_->dim});
  backend.SelectRows({.x = {x_, {context.num_tokens, config_->dim}}, .rows = rows, .out = selected});
  backend.RmsNorm({.x = selected, .weight = norm_.view(), .eps = static_cast<float>(config_->norm_eps), .out = selected});
  if (context.collective == nullptr) {
    backend.MatMul({.x = selected, .weight = &output(), .out = logits});
    return;
  }
  const TensorView<float, 2> local(local_logits_, {slots, shard_.Vocabulary(*config_).size()});
  backend.MatMul({.x = selected, .weight = &output(), .out = local});
  std::vector<int64_t> widths;
  for (int r = 0; r < shard_.ranks; ++r) widths.push_back(Shard{r, shard_.ranks}.Vocabulary(*config_).size());
  context.collective->AllGather(local, widths, logits);
}

}  // namespace memserve::engine
