"""The sparse-memory-lm family (re133/sparse-memory-lm): a Llama-style trunk with a fused wqkv and w13, tied embeddings, rotary pairs in
halves, and memory layers with BatchNorm on the queries and, in some, a learned scale of the scores per head. Either one file
(model.pt: model_config, state_dict), or the form for a table outside the GPU: rest.pt with values_q4.bin and scales_q4.bin (or
values_bf16.bin)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np

from memserve.convert import shapes, tokenizers
from memserve.convert.errors import ConvertError, short
from memserve.convert.families import original
from memserve.convert.families.peer import interleave
from memserve.convert.files import Source
from memserve.convert.model import Model
from memserve.convert.readers import torch_zip
from memserve.convert.readers.safetensors import FileTensor
from memserve.convert.shapes import Fields
from memserve.convert.tensor import MappedRows, RowRange, Tensor

RENAMED = {
    "attn_norm.weight": "attention_norm.weight", "ffn_norm.weight": "ffn_norm.weight", "attn.wo.weight": "attention.wo.weight",
    "ffn.w2.weight": "feed_forward.w2.weight", "ffn.keys": "feed_forward.keys", "ffn.values.weight": "feed_forward.values.weight",
    "ffn.query_proj.weight": "feed_forward.query_proj.query_mlps.0.weight",
    "ffn.query_proj.bias": "feed_forward.query_proj.query_mlps.0.bias",
    "ffn.swilu_proj.weight": "feed_forward.swilu_projection.weight", "ffn.swilu_proj.bias": "feed_forward.swilu_projection.bias",
    "ffn.value_proj.weight": "feed_forward.value_proj.weight", "ffn.value_proj.bias": "feed_forward.value_proj.bias",
    "ffn.log_score_scale": "feed_forward.log_score_scale",
}  # fmt: skip
QUERY_NORM = "ffn.query_norm."


def recognises(source: Source) -> Optional[str]:
    """The file with the weights."""
    for name in ("rest.pt", "model.pt"):
        if source.has(name):
            return name
    return None


def read(source: Source, name: str, tokenizer: Optional[Path]) -> Model:
    archive = torch_zip.Archive(source.open(name))
    document = archive.pickle()
    if not isinstance(document, dict) or not isinstance(document.get("model_config"), dict):
        raise ConvertError(f"{archive.where} has no model_config; it is not of the sparse-memory-lm family")
    where = f"{archive.where}: model_config"
    theirs = Fields(document["model_config"], where)
    config = _config(theirs)
    memory = config["productkey_args"]
    model = Model("sparse-memory-lm", source, config, {})
    stored = archive.tensors(document.get("state_dict"), "state_dict")
    if "table_keys" in document:
        _add_table(model, document, stored, where)
    _add_tensors(model, stored)
    original.tie(model, "tok_embeddings.weight", "output.weight", True, "the family ties it")
    config["weight_tying"] = True
    if memory["is_enabled"]:
        for layer in shapes.memory_layers(Fields(config, where)):
            keys = model.tensors.get(f"layers.{layer}.feed_forward.keys")
            if keys is not None and len(keys.shape) == 4:  # [heads, 2, n_keys, half] as one matrix
                rows = keys.shape[0] * keys.shape[1] * keys.shape[2]
                model.tensors[f"layers.{layer}.feed_forward.keys"] = FlatRows(keys, (rows, keys.shape[3]))
    original.share(model, where)
    original.fold_norms(model, where)
    shapes.check(model, where)
    if tokenizer is not None:
        files, config["tokenizer"] = tokenizers.from_option(tokenizer)
        model.files.update(files)
    else:
        model.files.update(tokenizers.beside(source))
        config["tokenizer"] = tokenizers.kind(model.files)
        if config["tokenizer"] == "none":
            model.notes.append(
                "the family uses GPT-2's tokenizer and does not carry it: give --tokenizer=tokenizer.json, "
                "or the model takes token ids only"
            )
    return model


def _config(theirs: Fields) -> Dict[str, Any]:
    layers = theirs.document.get("mem_layers") or []
    if not isinstance(layers, (list, tuple)) or not all(type(layer) is int for layer in layers):
        raise ConvertError(f"{theirs.where}: mem_layers is {short(layers)}; it must be a list of layers")
    norm = theirs.text("mem_query_norm", "batchnorm")
    if norm not in ("batchnorm", "none"):
        raise ConvertError(f"{theirs.where}: mem_query_norm is '{short(norm)}'; known are batchnorm and none")
    scale = theirs.text("mem_score_scale", "none")
    if scale not in ("learned", "none"):
        raise ConvertError(f"{theirs.where}: mem_score_scale is '{short(scale)}'; known are learned and none")
    dim = theirs.integer("d_model", 1, 1 << 20, 384)
    v_dim = theirs.integer("mem_v_dim", -1, 1 << 20, -1)
    swilu = theirs.boolean("mem_swilu", True)
    return {
        "model_type": "memory_llama",
        "dim": dim,
        "n_layers": theirs.integer("n_layers", 1, 4096, 12),
        "head_dim": None,
        "n_heads": theirs.integer("n_heads", 1, 4096, 6),
        "n_kv_heads": None,
        "ffn_dim": theirs.integer("ffn_hidden", 1, 1 << 24, 1024),
        "norm_eps": theirs.number("norm_eps", 0.0, 1.0, 1e-5),
        "rope_theta": theirs.number("rope_theta", 1.0, 1e12, 10000.0),
        "max_seqlen": theirs.integer("max_seq_len", 1, 1 << 24, 1024),
        "vocab_size": theirs.integer("vocab_size", 1, 1 << 24, 50304),
        "weight_tying": True,
        "productkey_args": {
            "is_enabled": bool(layers),
            "layers": ",".join(map(str, layers)),
            "mem_n_keys": theirs.integer("mem_n_keys", 1, 46340, 512),
            "mem_heads": theirs.integer("mem_heads", 1, 1024, 4),
            "mem_knn": theirs.integer("mem_knn", 1, 1024, 32),
            "mem_share_values": theirs.boolean("mem_share_values", False),
            "mem_k_dim": theirs.integer("mem_k_dim", 2, 1 << 20, 256),
            "mem_v_dim": v_dim if swilu and v_dim > 0 else -1,  # without swilu there is no projection, and rows are dim wide
            "swilu_projection": swilu,
            "mem_gated": False,
            "peer_variant": False,
        },
    }


class FlatRows(Tensor):
    """The same elements as a matrix with more rows."""

    def __init__(self, base: Tensor, shape: tuple):
        super().__init__(base.where, base.dtype, shape)
        self._base = base
        self._per_row = base.num_rows and shape[0] // base.num_rows

    def rows(self, begin: int, end: int) -> np.ndarray:
        first, last = begin // self._per_row, -(-end // self._per_row)
        block = self._base.rows(first, last).reshape(-1, self.row_elements)
        return block[begin - first * self._per_row : end - first * self._per_row]


def _add_tensors(model: Model, stored: Dict[str, Tensor]) -> None:
    config = model.config
    dim, ffn, n_heads = config["dim"], config["ffn_dim"], config["n_heads"]
    tensors = model.tensors
    for name, tensor in stored.items():
        outer = {"tok_emb.weight": "tok_embeddings.weight", "norm.weight": "norm.weight", "lm_head.weight": "output.weight"}
        if name in outer:
            tensors[outer[name]] = tensor
            continue
        parts = name.split(".", 2)
        if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdigit():
            raise ConvertError(f"{tensor.where} is not known in the sparse-memory-lm family")
        prefix, rest = f"layers.{int(parts[1])}.", parts[2]
        if rest == "attn.wqkv.weight":
            _expect(tensor, (3 * dim, dim))
            tensors[prefix + "attention.wq.weight"] = interleave(RowRange(tensor, 0, dim), n_heads)
            tensors[prefix + "attention.wk.weight"] = interleave(RowRange(tensor, dim, dim), n_heads)
            tensors[prefix + "attention.wv.weight"] = RowRange(tensor, 2 * dim, dim)
        elif rest == "ffn.w13.weight":
            _expect(tensor, (2 * ffn, dim))
            tensors[prefix + "feed_forward.w1.weight"] = RowRange(tensor, 0, ffn)
            tensors[prefix + "feed_forward.w3.weight"] = RowRange(tensor, ffn, ffn)
        elif rest.startswith(QUERY_NORM):
            if not rest.endswith("num_batches_tracked"):
                tensors[f"{prefix}feed_forward.query_norm.{rest[len(QUERY_NORM) :]}"] = tensor
        elif rest in RENAMED:
            tensors[prefix + RENAMED[rest]] = tensor
        else:
            raise ConvertError(f"{tensor.where} is not known in the sparse-memory-lm family")


def _expect(tensor: Tensor, shape: tuple) -> None:
    if tensor.shape != shape:
        raise ConvertError(f"{tensor.where} has the shape {list(tensor.shape)}; model_config asks for {list(shape)}")


def _add_table(model: Model, document: Dict[str, Any], stored: Dict[str, Tensor], where: str) -> None:
    """The table from its own files. rest.pt says under which names it belongs."""
    folder = model.source.folder
    names, shape = document.get("table_keys"), document.get("table_shape")
    memory = model.config["productkey_args"]
    if not isinstance(names, (list, tuple)) or not names or not isinstance(shape, (list, tuple)) or len(shape) != 2:
        raise ConvertError(f"{where.rsplit(': ', 1)[0]} does not say where its table belongs (table_keys, table_shape)")
    rows, width = shape
    wanted = (memory["mem_n_keys"] ** 2, memory["mem_v_dim"] if memory["mem_v_dim"] > 0 else model.config["dim"])
    if (rows, width) != wanted:
        raise ConvertError(f"{where.rsplit(': ', 1)[0]}: table_shape is {short(list(shape))}; model_config asks for {list(wanted)}")
    if len(names) > 1 and not memory["mem_share_values"]:
        raise ConvertError(f"{where}: one table belongs to {len(names)} layers, although mem_share_values is not set")
    owner = f"layers.{memory['layers'].split(',')[0]}.feed_forward.values"
    if model.source.has("values_q4.bin"):
        packed = _whole(model.source, "values_q4.bin", "U8", (rows, width // 2))
        scales = _whole(model.source, "scales_q4.bin", "F16", (rows,))
        if width % 2:
            raise ConvertError(f"{folder / 'values_q4.bin'}: rows of an odd width, {width}, have no 4-bit form in this family")
        model.tensors[owner + ".weight"] = MappedRows((packed,), "U8", (rows, (width + 1) // 2), neighbours)
        model.tensors[owner + ".scale"] = MappedRows((scales,), "F32", (rows,), lambda s: s.astype("<f4"))
        model.exact |= {owner + ".weight", owner + ".scale"}
        model.notes.append("the 4-bit rows keep their codes and scales; only their order in a byte changes")
    elif model.source.has("values_bf16.bin"):
        model.tensors[owner + ".weight"] = _whole(model.source, "values_bf16.bin", "BF16", (rows, width))
    else:
        raise ConvertError(f"{folder} has rest.pt, but neither values_q4.bin nor values_bf16.bin with the value table")


def _whole(source: Source, name: str, dtype: str, shape: tuple) -> Tensor:
    file = source.open(name)
    tensor = FileTensor(file, str(file.path), dtype, shape, 0)
    if file.size != tensor.nbytes:
        raise ConvertError(f"{file.path} has {file.size} bytes; {dtype} {list(shape)} needs {tensor.nbytes}")
    return tensor


def neighbours(packed: np.ndarray) -> np.ndarray:
    """Theirs: byte i has column i low and column i + width/2 high. Ours: column 2i low and 2i + 1 high. Both add 8 to the code."""
    half = packed.shape[1]
    codes = np.empty((packed.shape[0], 2 * half), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, :half])
    np.right_shift(packed, 4, out=codes[:, half:])
    return codes[:, 0::2] | codes[:, 1::2] << 4
