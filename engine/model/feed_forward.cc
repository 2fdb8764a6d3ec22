#include "engine/model/feed_forward.h"

#include "absl/strings/str_cat.h"
#include "engine/model/load_macros.h"

namespace memserve::engine {

using kernels::TensorView;

FeedForwardScratch::FeedForwardScratch(const ModelConfig& config, const Shard& shard, int64_t max_tokens, Workspace& workspace)
    : gate(workspace.Take(max_tokens, shard.FeedForward(config).size())),
      up(workspace.Take(max_tokens, shard.FeedForward(config).size())) {}

absl::StatusOr<std::unique_ptr<FeedForward>> FeedForward::Load(const ModelConfig& config, const Shard& shard, int layer,
                                                               WeightLoader& loader) {
  auto ffn = std::make_unique<FeedForward>();
  ffn->columns_ = shard.FeedForward(config);
  const std::string prefix = absl::StrCat("layers.", layer, ".feed_forward.");
  const Range all = {0, config.dim};
  LOAD_OR_RETURN(ffn->w1_, loader.LoadMatrix(prefix + "w1.weight", config.ffn_dim, config.dim, ffn->columns_, all));
  LOAD_OR_RETURN(ffn->w3_, loader.LoadMatrix(prefix + "w3.weight", config.ffn_dim, config.dim, ffn->columns_, all));
  LOAD_OR_RETURN(ffn->w2_, loader.LoadMatrix(prefix + "w2.weight", config.dim, config.ffn_dim, all, ffn->columns_));
  if (config.mlp_bias) {
    LOAD_OR_RETURN(ffn->w1_bias_, loader.LoadVector(prefix + "w1.bias", config.ffn_dim, ffn->columns_));
    LOAD_OR_RETURN(ffn->w3_bias_, loader.LoadVector(prefix + "w3.bias", config.ffn_dim, ffn->columns_));
    const Range bias = shard.rank == 0 ? all : Range{0, 0};
    LOAD_OR_RETURN(ffn->w2_bias_, loader.LoadVector(prefix + "w2.bias", config.dim, bias));
  }
  return ffn;
}

void FeedForward::Forward(const ForwardContext& context, const FeedForwardScratch& scratch, TensorView<const float, 2> x,
                          TensorView<float, 2> out) const {
  kernels::Backend& backend = *context.backend;
  const TensorView<float, 2> gate(scratch.gate, {context.num_tokens, columns_.size()});
  const TensorView<float, 2> up(scratch.up, {context.num_tokens, columns_.size()});
  backend.MatMul({.x = x, .weight = w1_.get(), .bias = w1_bias_.view(), .out = gate});
  backend.MatMul({.x = x, .weight = w3_.get(), .bias = w3_bias_.view(), .out = up});
  backend.SiluProduct({.a = gate, .b = up, .out = gate});
  backend.MatMul({.x = gate, .weight = w2_.get(), .bias = w2_bias_.view(), .out = out});
  if (context.collective != nullptr) context.collective->AllReduce(out);
}

}  // namespace memserve::engine
