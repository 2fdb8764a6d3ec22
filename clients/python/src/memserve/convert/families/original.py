"""The original memory-layer implementation (facebookresearch/memory): params.json with consolidated.pth, or with the shards of a
distributed checkpoint (.metadata, *.distcp)."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Dict, Optional, Tuple

import numpy as np

from memserve.convert import shapes, tokenizers
from memserve.convert.errors import ConvertError, short
from memserve.convert.files import Source
from memserve.convert.model import Model
from memserve.convert.readers import distcp, torch_zip
from memserve.convert.tensor import Computed, Tensor

MODEL_KEYS = (
    "dim", "n_layers", "head_dim", "n_heads", "n_kv_heads", "ffn_dim_multiplier", "multiple_of", "norm_eps",
    "rope_theta", "max_seqlen", "vocab_size", "weight_tying", "sliding_window",
)  # fmt: skip
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
BATCH_NORM_EPS = 1e-5


def recognises(source: Source) -> bool:
    return source.has("params.json") and (source.has("consolidated.pth") or source.has(".metadata"))


def read(source: Source, tokenizer: Optional[Path]) -> Model:
    where = str(source.folder / "params.json")
    params = source.json("params.json")
    arguments = params.get("model")
    if not isinstance(arguments, dict):
        raise ConvertError(f"{where}: 'model', the model's arguments, is missing")
    config: Dict[str, Any] = {"model_type": "memory_llama"}
    config.update({key: arguments.get(key) for key in MODEL_KEYS})
    config["productkey_args"] = arguments.get("productkey_args")
    if config["max_seqlen"] is None:
        data = params.get("data")
        config["max_seqlen"] = data.get("seq_len") if isinstance(data, dict) else None

    if source.has("consolidated.pth"):
        archive = torch_zip.Archive(source.open("consolidated.pth"))
        state = archive.pickle()
        if isinstance(state, dict) and "model" in state:
            state = state["model"]
        tensors = archive.tensors(state, "'model'")
        kind = "original memory-layer checkpoint"
    else:
        tensors = distcp.read_folder(source, "model.")
        kind = "original memory-layer checkpoint, distributed"

    model = Model(kind, source, config, {})
    for name, tensor in tensors.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        if not name.endswith((".num_batches_tracked", "rope_embeddings.freqs_cis", "rope.freqs_cis")):
            model.tensors[name] = tensor
    tie(model, "tok_embeddings.weight", "output.weight", bool(config["weight_tying"]), "weight_tying")
    share(model, where)
    fold_norms(model, where)
    shapes.check(model, where)
    config["tokenizer"] = add_tokenizer(model, params, tokenizer)
    return model


def add_tokenizer(model: Model, params: Dict[str, Any], tokenizer: Optional[Path]) -> str:
    if tokenizer is not None:
        files, kind = tokenizers.from_option(tokenizer)
        model.files.update(files)
        return kind
    data = shapes.Fields(params, str(model.source.folder / "params.json")).object("data").object("tokenizer")
    name, path = data.text("name", "none"), data.text("path", "")
    if name == "bytes":
        return "bytes"
    kind = {"sp": "sentencepiece", "tiktoken": "tiktoken"}.get(name)
    if kind is None:
        model.notes.append(f"the tokenizer '{short(name)}' is not known here; the model takes token ids only, or give --tokenizer")
        return "none"
    # The path is that of the training machine: the file is looked for beside params.json, by its name.
    base = PurePosixPath(path.replace("\\", "/")).name
    for folder in (model.source, Source(model.source.folder.parent)):
        for candidate in dict.fromkeys((base, "tokenizer.model")):
            if candidate and folder.has(candidate):
                found = folder.read(candidate, tokenizers.MAX_TOKENIZER_BYTES)
                if tokenizers.kind_of_model(found) != kind:
                    raise ConvertError(f"{folder.folder / candidate} is no {kind} model, as params.json says it is")
                model.files["tokenizer.model"] = found
                return kind
    model.notes.append(
        f"the tokenizer '{short(path)}' is not beside params.json; the model takes token ids only, or give --tokenizer=FILE"
    )
    return "none"


def equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    step = max(1, (8 << 20) // max(1, one.nbytes // max(1, one.num_rows)))
    for begin in range(0, one.num_rows, step):
        end = min(begin + step, one.num_rows)
        if one.rows(begin, end).tobytes() != other.rows(begin, end).tobytes():
            return False
    return True


def tie(model: Model, embeddings: str, output: str, tied: bool, option: str) -> None:
    """A tied output is stored once, as the embeddings."""
    if not tied or output not in model.tensors:
        return
    copy = model.tensors.pop(output)
    if embeddings not in model.tensors:
        model.tensors[embeddings] = copy
        return
    _also_check(model, lambda: _require_equal(copy, model.tensors[embeddings], f"{option} is set"))


def _also_check(model: Model, check) -> None:
    before = model.check
    model.check = (lambda: (before(), check()) and None) if before else check


def _require_equal(copy: Tensor, kept: Tensor, why: str) -> None:
    if not equal(copy, kept):
        raise ConvertError(f"{copy.where} differs from {kept.where.rsplit(': ', 1)[-1]}, although {why}")


def share(model: Model, where: str) -> None:
    """A shared table is kept under its first memory layer; copies under the others must equal it."""
    config = shapes.Fields(model.config, where)
    layers = shapes.memory_layers(config)
    memory = config.object("productkey_args")
    if not layers or not memory.boolean("mem_share_values", True):
        return
    for table in ("values.weight", "values_u.weight", "values_v.weight"):
        listed = [name for name in (f"layers.{layer}.feed_forward.{table}" for layer in layers) if name in model.tensors]
        if not listed:
            continue
        kept = model.tensors[listed[0]]
        for name in listed[1:]:
            copy = model.tensors.pop(name)
            _also_check(model, lambda copy=copy, kept=kept: _require_equal(copy, kept, "mem_share_values is set"))
        owner = f"layers.{layers[0]}.feed_forward.{table}"
        if listed[0] != owner:
            model.tensors[owner] = model.tensors.pop(listed[0])


def fold_norms(model: Model, where: str) -> None:
    """What normalises queries by constants, or keys, becomes part of the projection or of the keys."""
    config = shapes.Fields(model.config, where)
    memory = config.object("productkey_args")
    for layer in shapes.memory_layers(config):
        prefix = f"layers.{layer}.feed_forward."
        for name in ("query_norm", "query_proj.query_norm", "query_proj.query_mlps.1"):
            if f"{prefix}{name}.running_mean" in model.tensors:
                fold_batch_norm(model, prefix, prefix + "query_proj.query_mlps.0", prefix + name)
            elif f"{prefix}{name}.weight" in model.tensors:
                keep_query_norm(model, memory, prefix, prefix + name)
        for name in ("keys_norm", "key_norm"):
            if f"{prefix}{name}.weight" in model.tensors:
                fold_key_norm(model, memory, prefix, prefix + name)
        scale = model.tensors.pop(prefix + "log_score_scale", None)
        if scale is not None:
            fold_score_scale(model, memory, prefix + "keys", scale)


def fold_batch_norm(model: Model, prefix: str, projection: str, norm: str) -> None:
    """BatchNorm at inference is q * g + c with constants: g goes into the rows of the projection, c into its bias."""
    tensors = model.tensors
    try:
        weight, bias = tensors[projection + ".weight"], tensors[projection + ".bias"]
        mean, variance = tensors.pop(norm + ".running_mean"), tensors.pop(norm + ".running_var")
    except KeyError as error:
        raise ConvertError(
            f"{model.source.folder}: the tensor {error} is missing, which the BatchNorm '{short(norm)}' needs"
        ) from None
    gamma, beta = tensors.pop(norm + ".weight", None), tensors.pop(norm + ".bias", None)
    rows = weight.shape[0]
    for tensor in (bias, mean, variance, gamma, beta):
        if tensor is not None and tensor.shape != (rows,):
            raise ConvertError(f"{tensor.where} has the shape {list(tensor.shape)}; the query projection asks for [{rows}]")

    def factors() -> Tuple[np.ndarray, np.ndarray]:
        spread = variance.f64()
        if not (spread >= 0).all():
            raise ConvertError(f"{variance.where} has a negative variance")
        gain = (gamma.f64() if gamma is not None else 1.0) / np.sqrt(spread + BATCH_NORM_EPS)
        return gain, (beta.f64() if beta is not None else 0.0) - gain * mean.f64()

    tensors[projection + ".weight"] = Computed(
        weight.where, "F32", weight.shape, lambda: (weight.f64() * factors()[0][:, None]).astype("<f4")
    )
    tensors[projection + ".bias"] = Computed(
        bias.where, "F32", bias.shape, lambda: (bias.f64() * factors()[0] + factors()[1]).astype("<f4")
    )
    model.notes.append(f"{prefix[:-1]}: the queries' BatchNorm is folded into their projection")


def keep_query_norm(model: Model, memory: shapes.Fields, prefix: str, norm: str) -> None:
    """LayerNorm (with a bias) or RMSNorm over each query or each half: evaluated by the server."""
    weight = model.tensors.pop(norm + ".weight")
    bias = model.tensors.pop(norm + ".bias", None)
    k_dim = memory.integer("mem_k_dim", 2, 1 << 20, 512)
    if weight.shape not in ((k_dim,), (k_dim // 2,)):
        raise ConvertError(
            f"{weight.where} has the shape {list(weight.shape)}; a norm of the query has [{k_dim}], of a half [{k_dim // 2}]"
        )
    kind = memory.text("query_norm", "") or ("layer_norm" if bias is not None else "rms_norm")
    chosen = {"query_norm": kind, "query_norm_over": "head" if weight.shape == (k_dim,) else "half"}
    memory.document.update(chosen)
    model.tensors[prefix + "query_norm.weight"] = weight
    if bias is not None:
        model.tensors[prefix + "query_norm.bias"] = bias


def fold_key_norm(model: Model, memory: shapes.Fields, prefix: str, norm: str) -> None:
    """LayerNorm (with a bias) or RMSNorm over each half key: the keys are constants, so their norm is, too."""
    keys = model.tensors[prefix + "keys"]
    weight, bias = model.tensors.pop(norm + ".weight"), model.tensors.pop(norm + ".bias", None)
    half = keys.shape[-1] if keys.shape else 0
    for tensor in (weight, bias):
        if tensor is not None and tensor.shape != (half,):
            raise ConvertError(f"{tensor.where} has the shape {list(tensor.shape)}; a norm of half keys has [{half}]")
    eps = memory.number("key_norm_eps", 0.0, 1.0, 1e-5)

    def normed() -> np.ndarray:
        x = keys.f64()
        if bias is not None:
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight.f64()
        return (x if bias is None else x + bias.f64()).astype("<f4")

    model.tensors[prefix + "keys"] = Computed(keys.where, "F32", keys.shape, normed)
    model.notes.append(f"{prefix[:-1]}: the keys' norm is folded into the keys")


def fold_score_scale(model: Model, memory: shapes.Fields, name: str, scale: Tensor) -> None:
    """softmax(exp(s) * scores): a positive factor per head selects the same rows, so it can be a factor of that head's keys."""
    keys = model.tensors[name]
    heads = memory.integer("mem_heads", 1, 1024, 4)
    if scale.shape != (heads,) or not keys.shape or keys.elements % heads:
        raise ConvertError(f"{scale.where} has the shape {list(scale.shape)}; there are {heads} memory heads")

    def scaled() -> np.ndarray:
        by_head = keys.f64().reshape(heads, -1) * np.exp(scale.f64())[:, None]
        return by_head.reshape(keys.shape).astype("<f4")

    model.tensors[name] = Computed(keys.where, "F32", keys.shape, scaled)
    model.notes.append(f"{name.rsplit('.', 1)[0]}: the learned score scale is folded into the keys")
