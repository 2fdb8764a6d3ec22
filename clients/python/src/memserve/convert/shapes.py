"""The tensors that a memory_llama configuration asks for, with their shapes; and the checks against what a source has."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Set, Tuple

from memserve.convert.errors import ConvertError, short
from memserve.convert.model import Model

MAX_LAYERS = 4096


class Fields:
    """Reads a configuration from outside; `where` names its file."""

    def __init__(self, document: Dict[str, Any], where: str):
        self.document = document
        self.where = where

    def integer(self, key: str, low: int, high: int, default: Any = None) -> Any:
        value = self.document.get(key)
        if value is None:
            if default is not None:
                return default
            raise ConvertError(f"{self.where}: {key} is missing")
        if type(value) is not int or not low <= value <= high:
            raise ConvertError(f"{self.where}: {key} is {short(value)}; it must be an integer in [{low}, {high}]")
        return value

    def number(self, key: str, low: float, high: float, default: float) -> float:
        value = self.document.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConvertError(f"{self.where}: {key} is {short(value)}; it must be a number in [{low}, {high}]")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.document.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConvertError(f"{self.where}: {key} is {short(value)}; it must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.document.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ConvertError(f"{self.where}: {key} is {short(value)}; it must be a string")
        return value

    def object(self, key: str) -> "Fields":
        value = self.document.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ConvertError(f"{self.where}: {key} is {short(value)}; it must be an object")
        return Fields(value, f"{self.where}: {key}")


def memory_layers(config: Fields) -> List[int]:
    """Ascending; empty where the memory is off."""
    memory = config.object("productkey_args")
    if not memory.boolean("is_enabled", False):
        return []
    n_layers = config.integer("n_layers", 1, MAX_LAYERS)
    layers = []
    for part in memory.text("layers", "").split(","):
        if not part.strip():
            continue
        if not part.strip().isdigit() or int(part) >= n_layers:
            raise ConvertError(f"{memory.where}.layers has '{short(part)}'; the model has layers 0 to {n_layers - 1}")
        layers.append(int(part))
    if len(set(layers)) != len(layers):
        raise ConvertError(f"{memory.where}.layers names a layer twice")
    return sorted(layers)


def feed_forward_dim(config: Fields) -> int:
    """The original implementation's width: both int() truncate."""
    given = config.integer("ffn_dim", 1, 1 << 24, 0)
    if given:
        return given
    multiple_of = config.integer("multiple_of", 1, 1 << 20, 256)
    hidden = int(config.number("ffn_dim_multiplier", 1e-3, 1e3, 1.0) * int(2 * 4 * config.integer("dim", 1, 1 << 20) / 3))
    return multiple_of * math.ceil(hidden / multiple_of)


def expected(document: Dict[str, Any], where: str) -> Tuple[Dict[str, Tuple[int, ...]], Set[str], Set[str]]:
    """name -> shape; which of them are value tables; which may be left out."""
    config = Fields(document, where)
    dim = config.integer("dim", 1, 1 << 20)
    n_layers = config.integer("n_layers", 1, MAX_LAYERS)
    n_heads = config.integer("n_heads", 1, 4096)
    n_kv_heads = config.integer("n_kv_heads", 1, 4096, n_heads)
    head_dim = config.integer("head_dim", 2, 4096, max(2, dim // n_heads))
    vocab = config.integer("vocab_size", 1, 1 << 24)
    shapes: Dict[str, Tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,)}
    tables: Set[str] = set()
    optional: Set[str] = set()
    if not config.boolean("weight_tying", False):
        shapes["output.weight"] = (vocab, dim)
    layers = memory_layers(config)
    memory = config.object("productkey_args")
    for layer in range(n_layers):
        name = f"layers.{layer}."
        shapes[name + "attention_norm.weight"] = shapes[name + "ffn_norm.weight"] = (dim,)
        shapes[name + "attention.wq.weight"] = (n_heads * head_dim, dim)
        shapes[name + "attention.wk.weight"] = shapes[name + "attention.wv.weight"] = (n_kv_heads * head_dim, dim)
        shapes[name + "attention.wo.weight"] = (dim, n_heads * head_dim)
        if config.boolean("attention_bias", False):
            shapes[name + "attention.wq.bias"] = (n_heads * head_dim,)
            shapes[name + "attention.wk.bias"] = shapes[name + "attention.wv.bias"] = (n_kv_heads * head_dim,)
        if config.boolean("qk_norm", False):
            shapes[name + "attention.q_norm.weight"] = shapes[name + "attention.k_norm.weight"] = (head_dim,)
        name += "feed_forward."
        if layer not in layers:
            ffn_dim = feed_forward_dim(config)
            shapes[name + "w1.weight"] = shapes[name + "w3.weight"] = (ffn_dim, dim)
            shapes[name + "w2.weight"] = (dim, ffn_dim)
            continue
        heads = memory.integer("mem_heads", 1, 1024, 4)
        n_keys = memory.integer("mem_n_keys", 1, 46340, 1024)
        k_dim = memory.integer("mem_k_dim", 2, 1 << 20, 512)
        mem_v_dim = memory.integer("mem_v_dim", -1, 1 << 20, -1)
        swilu = memory.boolean("swilu_projection", True)
        shapes[name + "keys"] = (2 * heads * n_keys, k_dim // 2)
        shapes[name + "query_proj.query_mlps.0.weight"] = (heads * k_dim, dim)
        shapes[name + "query_proj.query_mlps.0.bias"] = (heads * k_dim,)
        norm = memory.text("query_norm", "")
        if norm:
            width = k_dim if memory.text("query_norm_over", "head") == "head" else k_dim // 2
            shapes[name + "query_norm.weight"] = (width,)
            if norm == "layer_norm":
                shapes[name + "query_norm.bias"] = (width,)
                optional.add(name + "query_norm.bias")
        peer = memory.boolean("peer_variant", False)
        value_dim = mem_v_dim if mem_v_dim > 0 and not peer else dim
        projections: Dict[str, Tuple[int, ...]] = {}
        if swilu:
            projections.update({"swilu_projection.weight": (value_dim, dim), "swilu_projection.bias": (value_dim,)})
        if swilu or mem_v_dim > 0:
            projections.update({"value_proj.weight": (dim, value_dim), "value_proj.bias": (dim,)})
        if peer:  # they exist in what the original implementation writes, unused
            optional.update(name + key for key in projections)
        shapes.update({name + key: shape for key, shape in projections.items()})
        if memory.boolean("mem_gated", False):
            shapes[name + "gating.weight"], shapes[name + "gating.bias"] = (1, dim), (1,)
        owner = layer == layers[0] or not memory.boolean("mem_share_values", True)
        for table in ("values_u", "values_v") if peer else ("values",):
            key = f"{name}{table}.weight"
            shapes[key] = (n_keys * n_keys, value_dim)
            tables.add(key)
            if not owner:
                optional.add(key)
    return shapes, tables, optional


def check(model: Model, where: str) -> None:
    """Every tensor that the configuration asks for is there, in its shape, and no other. Fills in the names of the tables."""
    shapes, tables, optional = expected(model.config, where)
    for name in sorted(set(shapes) - set(model.tensors) - optional):
        raise ConvertError(
            f"{model.source.folder}: the tensor '{short(name)}' is missing; {where} asks for it, {list(shapes[name])}"
        )
    for name, tensor in model.tensors.items():
        if name not in shapes and not (name.endswith(".scale") and name[: -len("scale")] + "weight" in tables):
            raise ConvertError(
                f"{tensor.where} is not one that {where} asks for"
                + (f" ('{short(name)}')" if short(name) not in tensor.where else "")
            )
        if name in shapes and name not in model.exact and tensor.shape != shapes[name]:
            peer_unused = name in optional and name not in tables
            if not peer_unused:
                raise ConvertError(f"{tensor.where} has the shape {list(tensor.shape)}; {where} asks for {list(shapes[name])}")
    model.tables |= tables & set(model.tensors)
