"""Llama-family models in whose layers the feed-forward is a PEER of PEER-pytorch: a Hugging Face folder with `peer_config` in its
config.json (the arguments of PEER) and, in place of a layer's `mlp`,

  weight_down_embed.weight, weight_up_embed.weight [num_experts, dim]    to_queries.0.weight [2 * heads * dim_key, dim]
  keys [heads, num_keys, 2, dim_key]    norm.gamma [dim], with pre_rmsnorm
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from memserve.convert import shapes, tokenizers
from memserve.convert.errors import ConvertError, short
from memserve.convert.families import huggingface, original
from memserve.convert.files import Source
from memserve.convert.model import Model
from memserve.convert.shapes import Fields
from memserve.convert.tensor import Computed, Tensor

TRUNK = {
    "input_layernorm.weight": "attention_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight", "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight", "self_attn.o_proj.weight": "attention.wo.weight",
    "self_attn.q_proj.bias": "attention.wq.bias", "self_attn.k_proj.bias": "attention.wk.bias",
    "self_attn.v_proj.bias": "attention.wv.bias",
    "self_attn.q_norm.weight": "attention.q_norm.weight", "self_attn.k_norm.weight": "attention.k_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight", "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
}  # fmt: skip
PEER_NAMES = ("weight_down_embed.weight", "weight_up_embed.weight", "to_queries.0.weight", "keys", "norm.gamma")


def recognises(config: Dict[str, Any]) -> bool:
    return isinstance(config.get("peer_config"), dict)


def interleave(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection (or of a norm over a head): rotary pairs in halves -> pairs side by side."""
    rows = tensor.num_rows
    if rows % (2 * num_heads):
        raise ConvertError(f"{tensor.where} has {rows} rows, which are not {num_heads} heads of an even width")

    def reorder() -> np.ndarray:
        by_head = tensor.rows(0, rows).reshape(num_heads, 2, rows // num_heads // 2, -1)
        return np.ascontiguousarray(by_head.swapaxes(1, 2)).reshape(tensor.shape)

    return Computed(tensor.where, tensor.dtype, tensor.shape, reorder)


def read(source: Source, tokenizer: Optional[Path]) -> Model:
    where = str(source.folder / "config.json")
    theirs = source.json("config.json")
    huggingface.check_config(theirs, where)
    fields, peer = Fields(theirs, where), Fields(theirs, where).object("peer_config")
    if fields.boolean("mlp_bias", False) or (fields.boolean("attention_bias", False) and theirs["model_type"] != "qwen2"):
        raise ConvertError(f"{where}: mlp_bias, and attention_bias with one on the output, have no form beside memory layers")
    _check_peer(peer)
    tensors = huggingface.read_tensors(source)
    layers = sorted(
        {
            int(name.split(".")[2])
            for name in tensors
            if name.startswith("model.layers.") and name.endswith(".mlp.to_queries.0.weight")
        }
    )
    if not layers:
        raise ConvertError(f"{source.folder}: config.json has peer_config, but no layer has a tensor mlp.to_queries.0.weight")
    heads = peer.integer("heads", 1, 1024, 8)
    knn = peer.integer("num_experts_per_head", 1, 1024, 16)
    dim = fields.integer("hidden_size", 1, 1 << 20)
    n_heads = fields.integer("num_attention_heads", 1, 4096)
    keys = tensors.get(f"model.layers.{layers[0]}.mlp.keys")
    if keys is None or len(keys.shape) != 4 or keys.shape[0] != heads or keys.shape[2] != 2:
        raise ConvertError(
            f"{source.folder}: 'model.layers.{layers[0]}.mlp.keys' is missing or not [{heads}, num_keys, 2, dim_key]"
            + (f" but {list(keys.shape)}" if keys is not None else "")
        )
    window = fields.integer("sliding_window", 0, 1 << 30, 0) if theirs.get("use_sliding_window", True) else 0
    config: Dict[str, Any] = {
        "model_type": "memory_llama",
        "dim": dim,
        "n_layers": fields.integer("num_hidden_layers", 1, 4096),
        "head_dim": fields.integer("head_dim", 2, 4096, max(2, dim // n_heads)),
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("num_key_value_heads", 1, 4096, n_heads),
        "ffn_dim": fields.integer("intermediate_size", 1, 1 << 24),
        "norm_eps": fields.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        "rope_theta": fields.number("rope_theta", 1.0, 1e12, fields.object("rope_parameters").number("rope_theta", 1.0, 1e12, 10000.0)),
        "rope_scaling": _rope_scaling(theirs),
        "max_seqlen": fields.integer("max_position_embeddings", 1, 1 << 30, 2048),
        "vocab_size": fields.integer("vocab_size", 1, 1 << 24),
        "weight_tying": huggingface.tied(theirs),
        "sliding_window": window or None,
        "attention_bias": theirs["model_type"] == "qwen2",
        "qk_norm": theirs["model_type"] == "qwen3",
        "productkey_args": {
            "is_enabled": True, "layers": ",".join(map(str, layers)), "mem_n_keys": keys.shape[1], "mem_heads": heads,
            "mem_knn": knn, "mem_share_values": False, "mem_k_dim": 2 * keys.shape[3], "mem_v_dim": -1,
            "swilu_projection": False, "mem_gated": False, "peer_variant": True,
        },
    }  # fmt: skip
    model = Model("PEER-pytorch layers in a Hugging Face folder", source, config, {})
    for name, tensor in tensors.items():
        target = _target(name)
        if target is None:
            if name.endswith("rotary_emb.inv_freq"):
                continue
            raise ConvertError(f"{tensor.where} is not known beside PEER layers")
        if target.endswith(("wq.weight", "wq.bias", "q_norm.weight", "wk.weight", "wk.bias", "k_norm.weight")):
            tensor = interleave(tensor, 1 if "_norm" in target else n_heads if "wq" in target else config["n_kv_heads"])
        model.tensors[target] = tensor
    for layer in layers:
        _layer(model, f"layers.{layer}.", heads, keys.shape[1], keys.shape[3], dim)
    original.tie(model, "tok_embeddings.weight", "output.weight", huggingface.tied(theirs), "tie_word_embeddings")
    shapes.check(model, where)
    model.files.update(tokenizers.beside(source))
    if tokenizer is not None:
        model.files.update(tokenizers.from_option(tokenizer)[0])
    config["tokenizer"] = tokenizers.kind(model.files)
    return model


def _rope_scaling(theirs: Dict[str, Any]) -> Any:
    """Newer configurations keep it in rope_parameters, together with theta."""
    newer = theirs.get("rope_parameters")
    if isinstance(newer, dict) and newer.get("rope_type", "default") != "default":
        return {key: value for key, value in newer.items() if key != "rope_theta"}
    return theirs.get("rope_scaling")


def _check_peer(peer: Fields) -> None:
    """Options that change what is computed and have no counterpart."""
    if peer.boolean("separate_embed_per_head", False):
        raise ConvertError(f"{peer.where}: separate_embed_per_head is set; tables of their own for each head are not supported")
    softmax = peer.document.get("softmax_on_scores", None)
    if softmax is None and "non_competing_scores" in peer.document:
        softmax = not peer.boolean("non_competing_scores", True)
    if softmax is not True:
        raise ConvertError(
            f"{peer.where}: softmax_on_scores is not true; scores through ReLU are not supported "
            "(versions of PEER-pytorch differ in the default, so it must be given)"
        )
    activation = peer.text("activation", "gelu").lower()
    if activation != "gelu":
        raise ConvertError(f"{peer.where}: activation is '{short(activation)}'; only gelu (exact) is supported")
    knn = peer.integer("num_experts_per_head", 1, 1024, 16)
    if peer.integer("product_key_topk", 1, 1 << 20, knn) < knn:
        raise ConvertError(f"{peer.where}: product_key_topk is smaller than num_experts_per_head, {knn}, which is not supported")


def _target(name: str) -> Optional[str]:
    outer = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name]
    parts = name.split(".", 3)
    if len(parts) != 4 or parts[:2] != ["model", "layers"] or not parts[2].isdigit():
        return None
    if parts[3] in TRUNK:
        return f"layers.{int(parts[2])}.{TRUNK[parts[3]]}"
    if parts[3].startswith("mlp.") and parts[3][4:] in PEER_NAMES:
        return f"layers.{int(parts[2])}.peer.{parts[3][4:]}"
    return None


def _layer(model: Model, prefix: str, heads: int, n_keys: int, half: int, dim: int) -> None:
    tensors = model.tensors

    def take(name: str, expected: List[int]) -> Tensor:
        tensor = tensors.pop(prefix + "peer." + name, None)
        if tensor is None:
            raise ConvertError(f"{model.source.folder}: the tensor 'model.{prefix}mlp.{name}' is missing")
        if list(tensor.shape) != expected:
            raise ConvertError(f"{tensor.where} has the shape {list(tensor.shape)}; the PEER layer asks for {expected}")
        return tensor

    queries = take("to_queries.0.weight", [2 * heads * half, dim])
    keys = take("keys", [heads, n_keys, 2, half])

    def by_head() -> np.ndarray:  # (half, head, d) -> (head, half, d)
        return np.ascontiguousarray(queries.array().reshape(2, heads, half, dim).swapaxes(0, 1)).reshape(2 * heads * half, dim)

    def by_half() -> np.ndarray:  # (head, key, half, d) -> (head, half, key, d)
        return np.ascontiguousarray(keys.array().swapaxes(1, 2)).reshape(2 * heads * n_keys, half)

    out = prefix + "feed_forward."
    rows = 2 * heads * half
    tensors[out + "query_proj.query_mlps.0.weight"] = Computed(queries.where, queries.dtype, (rows, dim), by_head)
    tensors[out + "query_proj.query_mlps.0.bias"] = Computed(queries.where, "F32", (rows,), lambda: np.zeros(rows, "<f4"))
    tensors[out + "keys"] = Computed(keys.where, keys.dtype, (2 * heads * n_keys, half), by_half)
    tensors[out + "values_u.weight"] = take("weight_down_embed.weight", [n_keys * n_keys, dim])
    tensors[out + "values_v.weight"] = take("weight_up_embed.weight", [n_keys * n_keys, dim])
    gamma = tensors.pop(prefix + "peer.norm.gamma", None)
    if gamma is not None:
        _fold_pre_norm(model, prefix, gamma, dim)


def _fold_pre_norm(model: Model, prefix: str, gamma: Tensor, dim: int) -> None:
    """PEER's own RMSNorm (weight gamma + 1) undoes the scale of the one before it, but not its weights: one norm does for both only
    where those are all equal."""
    before = model.tensors.get(prefix + "ffn_norm.weight")
    if gamma.shape != (dim,):
        raise ConvertError(f"{gamma.where} has the shape {list(gamma.shape)}; the model asks for [{dim}]")
    if before is not None:
        weights = before.f64()
        if before.shape != (dim,) or not (weights == weights[0]).all() or not weights[0] > 0:
            raise ConvertError(
                f"{gamma.where} is a second norm after {before.where.rsplit(': ', 1)[-1]}; the two have no common form"
            )
    model.tensors[prefix + "ffn_norm.weight"] = Computed(gamma.where, "F32", (dim,), lambda: (gamma.f64() + 1).astype("<f4"))
