"""Hugging Face folders of the Llama family. memserve reads them as they are: this copies them, checks their shapes, changes types,
and turns pytorch_model*.bin into safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from memserve.convert import tokenizers
from memserve.convert.errors import ConvertError, short
from memserve.convert.families import original
from memserve.convert.files import Source, SourceFile
from memserve.convert.model import Model
from memserve.convert.readers import safetensors, torch_zip
from memserve.convert.shapes import Fields
from memserve.convert.tensor import Tensor

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def read_bin(file: SourceFile) -> Dict[str, Tensor]:
    archive = torch_zip.Archive(file)
    state = archive.pickle()
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return archive.tensors(state)


def read_tensors(source: Source) -> Dict[str, Tensor]:
    if source.has("model.safetensors") or source.has("model.safetensors.index.json"):
        return safetensors.read_folder(source)
    if source.has("pytorch_model.bin.index.json"):
        return safetensors.read_index(source, "pytorch_model.bin.index.json", read_bin)
    if source.has("pytorch_model.bin"):
        return read_bin(source.open("pytorch_model.bin"))
    raise ConvertError(f"{source.folder} has neither model.safetensors nor pytorch_model.bin, nor an index of either")


def read(source: Source, tokenizer: Optional[Path]) -> Model:
    where = str(source.folder / "config.json")
    config = source.json("config.json")
    model = Model(
        "Hugging Face folder", source, dict(config), {}, dtype_keys={"torch_dtype", "dtype"} & set(config) or {"torch_dtype"}
    )
    check_config(config, where)
    tensors = read_tensors(source)
    wanted = expected(config, where)
    skipped = []
    for name, tensor in tensors.items():
        if name in wanted:
            if tensor.shape != wanted[name]:
                raise ConvertError(f"{tensor.where} has the shape {list(tensor.shape)}; {where} asks for {list(wanted[name])}")
            model.tensors[name] = tensor
        elif not name.endswith("rotary_emb.inv_freq"):
            skipped.append(name)
    for name in wanted:
        if name not in tensors and not (name == "lm_head.weight" and tied(config)):
            raise ConvertError(f"{source.folder}: the tensor '{name}' is missing; {where} asks for it, {list(wanted[name])}")
    if skipped:
        model.notes.append(f"{len(skipped)} tensors are not the model's and are left out, the first is '{short(skipped[0])}'")
    original.tie(model, "model.embed_tokens.weight", "lm_head.weight", tied(config), "tie_word_embeddings")
    model.files.update(tokenizers.beside(source))
    if tokenizer is not None:
        model.files.update(tokenizers.from_option(tokenizer)[0])
    return model


def tied(config: Dict[str, Any]) -> bool:
    return config.get("tie_word_embeddings") is True


def check_config(config: Dict[str, Any], where: str) -> None:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConvertError(f"{where}: model_type is '{short(model_type)}'; known are {', '.join(MODEL_TYPES)} and memory_llama")
    if config.get("quantization_config") is not None:
        raise ConvertError(
            f"{where}: the weights are quantised (quantization_config), which is not read; take the unquantised model"
        )


def expected(config: Dict[str, Any], where: str) -> Dict[str, Tuple[int, ...]]:
    """name -> shape."""
    fields = Fields(config, where)
    dim, vocab = fields.integer("hidden_size", 1, 1 << 20), fields.integer("vocab_size", 1, 1 << 24)
    n_heads = fields.integer("num_attention_heads", 1, 4096)
    n_kv_heads = fields.integer("num_key_value_heads", 1, 4096, n_heads)
    head_dim = fields.integer("head_dim", 2, 4096, max(2, dim // n_heads))
    ffn = fields.integer("intermediate_size", 1, 1 << 24)
    model_type = config["model_type"]
    shapes: Dict[str, Tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim)}
    for layer in range(fields.integer("num_hidden_layers", 1, 4096)):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = shapes[name + "post_attention_layernorm.weight"] = (dim,)
        wide: List[Tuple[str, Tuple[int, int], bool]] = []
        bias = fields.boolean("attention_bias", model_type == "qwen2") or model_type == "qwen2"
        wide += [("self_attn.q_proj", (n_heads * head_dim, dim), bias), ("self_attn.k_proj", (n_kv_heads * head_dim, dim), bias),
                 ("self_attn.v_proj", (n_kv_heads * head_dim, dim), bias),
                 ("self_attn.o_proj", (dim, n_heads * head_dim), bias and model_type != "qwen2")]  # fmt: skip
        bias = fields.boolean("mlp_bias", False) and model_type == "llama"
        wide += [("mlp.gate_proj", (ffn, dim), bias), ("mlp.up_proj", (ffn, dim), bias), ("mlp.down_proj", (dim, ffn), bias)]
        for stem, shape, has_bias in wide:
            shapes[f"{name}{stem}.weight"] = shape
            if has_bias:
                shapes[f"{name}{stem}.bias"] = shape[:1]
        if model_type == "qwen3":
            shapes[name + "self_attn.q_norm.weight"] = shapes[name + "self_attn.k_norm.weight"] = (head_dim,)
    shapes["model.norm.weight"] = (dim,)
    shapes["lm_head.weight"] = (vocab, dim)
    return shapes
