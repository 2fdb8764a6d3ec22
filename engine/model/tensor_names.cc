#include "engine/model/tensor_names.h"

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace memserve::engine {
namespace {

struct Part {
  absl::string_view ours;
  absl::string_view hugging_face;  // empty: not in such a model
  absl::string_view key;           // of config.json, that says whether a model has it
};

constexpr Part kModelParts[] = {
    {"tok_embeddings.weight", "model.embed_tokens.weight", ""},
    {"norm.weight", "model.norm.weight", ""},
    {"output.weight", "lm_head.weight", ""},
};

// After "layers.N.".
constexpr Part kLayerParts[] = {
    {"attention_norm.weight", "input_layernorm.weight", ""},
    {"ffn_norm.weight", "post_attention_layernorm.weight", ""},
    {"attention.wq.weight", "self_attn.q_proj.weight", ""},
    {"attention.wk.weight", "self_attn.k_proj.weight", ""},
    {"attention.wv.weight", "self_attn.v_proj.weight", ""},
    {"attention.wo.weight", "self_attn.o_proj.weight", ""},
    {"attention.wq.bias", "self_attn.q_proj.bias", "attention_bias"},
    {"attention.wk.bias", "self_attn.k_proj.bias", "attention_bias"},
    {"attention.wv.bias", "self_attn.v_proj.bias", "attention_bias"},
    {"attention.wo.bias", "self_attn.o_proj.bias", "attention_bias"},
    {"attention.q_norm.weight", "self_attn.q_norm.weight", "qk_norm"},
    {"attention.k_norm.weight", "self_attn.k_norm.weight", "qk_norm"},
    {"feed_forward.w1.weight", "mlp.gate_proj.weight", "productkey_args.layers"},
    {"feed_forward.w2.weight", "mlp.down_proj.weight", "productkey_args.layers"},
    {"feed_forward.w3.weight", "mlp.up_proj.weight", "productkey_args.layers"},
    {"feed_forward.w1.bias", "mlp.gate_proj.bias", "mlp_bias"},
    {"feed_forward.w2.bias", "mlp.down_proj.bias", "mlp_bias"},
    {"feed_forward.w3.bias", "mlp.up_proj.bias", "mlp_bias"},
    {"feed_forward.keys", "", "productkey_args.layers"},
    {"feed_forward.query_proj.query_mlps.0.weight", "", "productkey_args.layers"},
    {"feed_forward.query_proj.query_mlps.0.bias", "", "productkey_args.layers"},
    {"feed_forward.query_norm.weight", "", "productkey_args.query_norm"},
    {"feed_forward.query_norm.bias", "", "productkey_args.query_norm"},
    {"feed_forward.values.weight", "", "productkey_args.layers"},
    {"feed_forward.values_u.weight", "", "productkey_args.peer_variant"},
    {"feed_forward.values_v.weight", "", "productkey_args.peer_variant"},
    {"feed_forward.value_proj.weight", "", "productkey_args.swilu_projection"},
    {"feed_forward.value_proj.bias", "", "productkey_args.swilu_projection"},
    {"feed_forward.swilu_projection.weight", "", "productkey_args.swilu_projection"},
    {"feed_forward.swilu_projection.bias", "", "productkey_args.swilu_projection"},
    {"feed_forward.gating.weight", "", "productkey_args.mem_gated"},
    {"feed_forward.gating.bias", "", "productkey_args.mem_gated"},
};

// "layers.12.attention.wq.weight" → 12 and the rest.
bool SplitLayer(absl::string_view& name, absl::string_view prefix, int& layer) {
  absl::string_view rest = name;
  if (!absl::ConsumePrefix(&rest, prefix)) return false;
  const size_t dot = rest.find('.');
  if (dot == absl::string_view::npos || dot > 6 || !absl::SimpleAtoi(rest.substr(0, dot), &layer) || layer < 0) return false;
  name = rest.substr(dot + 1);
  return true;
}

}  // namespace

std::string TensorNames::Stored(absl::string_view ours) const {
  if (style_ == Style::kOriginal) return std::string(ours);
  int layer = 0;
  if (SplitLayer(ours, "layers.", layer)) {
    for (const Part& part : kLayerParts) {
      if (part.ours == ours && !part.hugging_face.empty()) return absl::StrCat("model.layers.", layer, ".", part.hugging_face);
    }
    return absl::StrCat("model.layers.", layer, ".", ours);
  }
  for (const Part& part : kModelParts) {
    if (part.ours == ours) return std::string(part.hugging_face);
  }
  return std::string(ours);
}

std::optional<std::string> TensorNames::ContradictedKey(absl::string_view stored, int n_layers) const {
  const bool original = style_ == Style::kOriginal;
  int layer = 0;
  if (!SplitLayer(stored, original ? "layers." : "model.layers.", layer)) return std::nullopt;
  if (layer >= n_layers) return original ? "n_layers" : "num_hidden_layers";
  for (const Part& part : kLayerParts) {
    if ((original ? part.ours : part.hugging_face) == stored) return std::string(part.key);
  }
  return std::nullopt;
}

}  // namespace memserve::engine
