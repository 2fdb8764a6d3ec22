#include "engine/model/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {

using kernels::TensorView;

RopeTables MakeRopeTables(const ModelConfig& config, int64_t positions, kernels::Backend* backend, Workspace& workspace) {
  const int64_t half_dim = config.head_dim / 2;
  float* cos = workspace.Take(positions, half_dim);
  float* sin = workspace.Take(positions, half_dim);
  if (cos == nullptr || sin == nullptr) return {};
  const std::vector<double> frequencies = RopeFrequencies(config.rope_scaling, config.rope_theta, config.head_dim);
  const double magnitude = config.rope_scaling.attention_factor;
  constexpr int64_t kRun = 64;  // positions at a time: the tables of a long context are large
  std::vector<float> host_cos(kRun * half_dim), host_sin(kRun * half_dim);
  for (int64_t begin = 0; begin < positions; begin += kRun) {
    const int64_t count = std::min(kRun, positions - begin);
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t i = 0; i < half_dim; ++i) {
        const double angle = static_cast<double>(begin + p) * frequencies[i];
        host_cos[p * half_dim + i] = static_cast<float>(magnitude * std::cos(angle));
        host_sin[p * half_dim + i] = static_cast<float>(magnitude * std::sin(angle));
      }
    }
    const int64_t bytes = count * half_dim * static_cast<int64_t>(sizeof(float));
    backend->CopyToDevice(cos + begin * half_dim, host_cos.data(), bytes);
    backend->CopyToDevice(sin + begin * half_dim, host_sin.data(), bytes);
    backend->Wait(backend->Record());
  }
  return {{cos, {positions, half_dim}}, {sin, {positions, half_dim}}};
}

AttentionScratch::AttentionScratch(const ModelConfig& config, const Shard& shard, int64_t max_tokens, Workspace& workspace)
    : q(workspace.Take(max_tokens, shard.Heads(config).size() * config.head_dim)),
      k(workspace.Take(max_tokens, shard.KvHeads(config).size() * config.head_dim)),
      v(workspace.Take(max_tokens, shard.KvHeads(config).size() * config.head_dim)),
      pooled(workspace.Take(max_tokens, shard.Heads(config).size() * config.head_dim)) {}

absl::StatusOr<std::unique_ptr<Attention>> Attention::Load(const ModelConfig& config, const Shard& shard, int layer,
                                                           WeightLoader& loader) {
  auto attention = std::make_unique<Attention>();
  attention->config_ = &config;
  attention->window_ = config.sliding_window[layer];
  attention->heads_ = shard.Heads(config);
  attention->kv_heads_ = shard.KvHeads(config);
  const std::string prefix = absl::StrCat("layers.", layer, ".attention.");
  const int64_t q_dim = int64_t{config.n_heads} * config.head_dim;
  const int64_t kv_dim = int64_t{config.n_kv_heads} * config.head_dim;
  const Range all = {0, config.dim};
  const Range q = {attention->heads_.begin * config.head_dim, attention->heads_.end * config.head_dim};
  const Range kv = {attention->kv_heads_.begin * config.head_dim, attention->kv_heads_.end * config.head_dim};
  LOAD_OR_RETURN(attention->wq_, loader.LoadMatrix(prefix + "wq.weight", q_dim, config.dim, q, all));
  LOAD_OR_RETURN(attention->wk_, loader.LoadMatrix(prefix + "wk.weight", kv_dim, config.dim, kv, all));
  LOAD_OR_RETURN(attention->wv_, loader.LoadMatrix(prefix + "wv.weight", kv_dim, config.dim, kv, all));
  LOAD_OR_RETURN(attention->wo_, loader.LoadMatrix(prefix + "wo.weight", config.dim, q_dim, all, q));
  if (config.qkv_bias) {
    LOAD_OR_RETURN(attention->q_bias_, loader.LoadVector(prefix + "wq.bias", q_dim, q));
    LOAD_OR_RETURN(attention->k_bias_, loader.LoadVector(prefix + "wk.bias", kv_dim, kv));
    LOAD_OR_RETURN(attention->v_bias_, loader.LoadVector(prefix + "wv.bias", kv_dim, kv));
  }
  if (config.output_bias) {
    const Range bias = shard.rank == 0 ? all : Range{0, 0};
    LOAD_OR_RETURN(attention->o_bias_, loader.LoadVector(prefix + "wo.bias", config.dim, bias));
  }
  if (config.qk_norm) {
    const Range head = {0, config.head_dim};
    LOAD_OR_RETURN(attention->q_norm_, loader.LoadVector(prefix + "q_norm.weight", config.head_dim, head));
    LOAD_OR_RETURN(attention->k_norm_, loader.LoadVector(prefix + "k_norm.weight", config.head_dim, head));
  }
  return attention;
}

void Attention::NormHeads(const ForwardContext& context, const Vector& weight, TensorView<float, 3> x) const {
  const TensorView<float, 2> heads(x.data, {x.dim(0) * x.dim(1), x.dim(2)});
  context.backend->RmsNorm({.x = heads, .weight = weight.view(), .eps = static_cast<float>(config_->norm_eps), .out = heads});
}

void Attention::Forward(const ForwardContext& context, const RopeTables& rope, const AttentionScratch& scratch,
                        const kernels::KvPages& pages, TensorView<const float, 2> x, TensorView<float, 2> out) const {
  kernels::Backend& backend = *context.backend;
  const int64_t tokens = context.num_tokens;
  const int64_t head_dim = config_->head_dim;
  const int64_t heads = heads_.size();
  const int64_t kv_heads = kv_heads_.size();
  const TensorView<float, 3> q(scratch.q, {tokens, heads, head_dim});
  const TensorView<float, 3> k(scratch.k, {tokens, kv_heads, head_dim});
  const TensorView<float, 3> v(scratch.v, {tokens, kv_heads, head_dim});
  const TensorView<float, 3> pooled(scratch.pooled, {tokens, heads, head_dim});

  backend.MatMul({.x = x, .weight = wq_.get(), .bias = q_bias_.view(), .out = {q.data, {tokens, heads * head_dim}}});
  backend.MatMul({.x = x, .weight = wk_.get(), .bias = k_bias_.view(), .out = {k.data, {tokens, kv_heads * head_dim}}});
  backend.MatMul({.x = x, .weight = wv_.get(), .bias = v_bias_.view(), .out = {v.data, {tokens, kv_heads * head_dim}}});
  if (config_->qk_norm) {
    NormHeads(context, q_norm_, q);
    NormHeads(context, k_norm_, k);
  }
  backend.Rope({.x = q, .positions = context.positions, .cos = rope.cos, .sin = rope.sin, .pairing = config_->rope_pairing});
  backend.Rope({.x = k, .positions = context.positions, .cos = rope.cos, .sin = rope.sin, .pairing = config_->rope_pairing});
  backend.KvWrite({.k = k, .v = v, .slots = context.kv_slots, .pages = pages});
  backend.Attention({.q = q,
                     .sequence = context.sequence,
                     .positions = context.positions,
                     .block_tables = context.block_tables,
                     .pages = pages,
                     .queries_per_kv = config_->n_heads / config_->n_kv_heads,
                     .first_query_head = heads_.begin,
                     .first_kv_head = kv_heads_.begin,
                     .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
                     .window = window_,
                     .out = pooled});
  backend.MatMul({.x = {pooled.data, {tokens, heads * head_dim}}, .weight = wo_.get(), .bias = o_bias_.view(), .out = out});
  if (context.collective != nullptr) context.collective->AllReduce(out);
}

}  // namespace memserve::engine
