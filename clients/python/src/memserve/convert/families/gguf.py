"""GGUF files of the llama (Llama, Mistral, SmolLM2, TinyLlama), qwen2 and qwen3 architectures -> Hugging Face folders."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from memserve.convert import tokenizers
from memserve.convert.errors import ConvertError, short
from memserve.convert.files import Source
from memserve.convert.model import Model
from memserve.convert.readers import gguf
from memserve.convert.shapes import Fields
from memserve.convert.tensor import Computed, Tensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(pattern: str) -> Dict[str, Any]:
    """A regular expression whose matches are the words, then bytes as characters."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**GPT2, "use_regex": False}]}


def _words(digits: str) -> str:
    """The pattern that Llama 3 and Qwen 2 share but for how many digits go together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


PRE_TOKENIZERS = {
    "default": GPT2, "gpt-2": GPT2, "gpt2": GPT2,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]},
    "llama-bpe": _split(_words(r"\p{N}{1,3}")), "llama3": _split(_words(r"\p{N}{1,3}")), "llama-v3": _split(_words(r"\p{N}{1,3}")),
    "qwen2": _split(_words(r"\p{N}")),
}  # fmt: skip
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


class Keys:
    """The keys of a GGUF file, those of its architecture by their short names."""

    def __init__(self, fields: Dict[str, Any], where: str):
        self.where = where
        self.architecture = Fields(fields, where).text("general.architecture", "")
        self.all = Fields(fields, where)

    def integer(self, key: str, low: int, high: int, default: Any = None) -> Any:
        return self.all.integer(f"{self.architecture}.{key}", low, high, default)

    def number(self, key: str, low: float, high: float, default: float) -> float:
        return _plain(self.all.number(f"{self.architecture}.{key}", low, high, default))

    def text(self, key: str, default: str) -> str:
        return self.all.text(f"{self.architecture}.{key}", default)


def _plain(value: float) -> float:
    """A float32 as the shortest decimal that names it: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def read(path: Path, tokenizer: Optional[Path]) -> Model:
    source = Source(path.parent)
    fields, stored = gguf.read(source.open(path.name))
    keys = Keys(fields, str(path))
    if keys.architecture not in ARCHITECTURES:
        raise ConvertError(f"{path} has the architecture '{short(keys.architecture)}'; known are {', '.join(ARCHITECTURES)}")
    if keys.integer("expert_count", 0, 1 << 20, 0) > 0:
        raise ConvertError(f"{path} is a mixture of experts, which is not supported")
    config = _config(keys, stored, path)
    model = Model(f"GGUF, {keys.architecture}", source, config, {})
    _add_tensors(model, stored, path)
    model.dtype_keys = {"torch_dtype"}
    embeddings = stored["token_embd.weight"]
    config["torch_dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(embeddings.dtype, "float32")
    if isinstance(embeddings, gguf.BlockTensor) or any(isinstance(t, gguf.BlockTensor) for t in stored.values()):
        model.notes.append("quantised blocks are written as f32, which holds them exactly; --dtype=bf16 halves that")
    if tokenizer is not None:
        model.files.update(tokenizers.from_option(tokenizer)[0])
    else:
        _add_tokenizer(model, keys)
    return model


def _config(keys: Keys, stored: Dict[str, Tensor], path: Path) -> Dict[str, Any]:
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in stored:
            raise ConvertError(f"{path}: the tensor '{name}' is missing")
    dim = keys.integer("embedding_length", 1, 1 << 20)
    n_heads = keys.integer("attention.head_count", 1, 4096)
    head_dim = keys.integer("attention.key_length", 2, 4096, max(2, dim // n_heads))
    n_layers = keys.integer("block_count", 1, 4096)
    rotated = keys.integer("rope.dimension_count", 1, 4096, head_dim)
    if rotated != head_dim or keys.integer("attention.value_length", 2, 4096, head_dim) != head_dim:
        raise ConvertError(f"{path}: rotates {rotated} of {head_dim} dimensions of a head; all of them must be")
    window = keys.integer("attention.sliding_window", 0, 1 << 30, 0)
    model_type = keys.architecture
    if model_type == "llama" and window:
        model_type = "mistral"
    context = keys.integer("context_length", 1, 1 << 30)
    config: Dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_size": dim,
        "intermediate_size": keys.integer("feed_forward_length", 1, 1 << 24),
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", 1, 4096, n_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 0.0, 1.0, 1e-5),
        "rope_theta": keys.number("rope.freq_base", 1.0, 1e12, 10000.0),
        "rope_scaling": _rope_scaling(keys, stored, head_dim, path),
        "vocab_size": stored["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in stored,
    }
    if model_type == "mistral":
        config["sliding_window"] = window or None
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in stored
    if model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in stored
    for key in ("bos", "eos"):
        value = keys.all.integer(f"tokenizer.ggml.{key}_token_id", 0, 1 << 30, -1)
        if value >= 0:
            config[f"{key}_token_id"] = value
    return config


def _rope_scaling(keys: Keys, stored: Dict[str, Tensor], head_dim: int, path: Path) -> Optional[Dict[str, Any]]:
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", 0.0, 1e6, keys.number("rope.scale_linear", 0.0, 1e6, 1.0)) or 1.0
    original = keys.integer("rope.scaling.original_context_length", 1, 1 << 30, 0)
    if "rope_freqs.weight" in stored:
        return _llama3_scaling(keys, stored["rope_freqs.weight"], head_dim, original)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None if factor == 1.0 or kind == "none" else {"rope_type": "linear", "factor": factor}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling: Dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        if original:
            scaling["original_max_position_embeddings"] = original
        for ours, theirs in (("attention_factor", "attn_factor"), ("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            value = keys.number(f"rope.scaling.{theirs}", 0.0, 1e6, 0.0)
            if value:
                scaling[ours] = value
        return scaling
    raise ConvertError(f"{path}: rope.scaling.type is '{short(kind)}'; known are none, linear, yarn and Llama 3's factors")


def _llama3_scaling(keys: Keys, tensor: Tensor, head_dim: int, original: int) -> Dict[str, Any]:
    """Llama 3's scaling is stored as a factor per frequency. Its parameters are found again and held against those factors."""
    if tensor.shape != (head_dim // 2,):
        raise ConvertError(f"{tensor.where} has the shape {list(tensor.shape)}; heads of {head_dim} ask for [{head_dim // 2}]")
    factors = tensor.f64()
    theta = keys.number("rope.freq_base", 1.0, 1e12, 10000.0)
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    scaling = {
        "rope_type": "llama3", "factor": _plain(float(factors.max())), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": original or 8192,
    }  # fmt: skip
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelength - low) / (high - low), 0.0, 1.0)
    if not (np.isfinite(factors).all() and factor >= 1 and np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3)):
        raise ConvertError(
            f"{tensor.where} has factors that are not Llama 3's (low 1, high 4, original context "
            f"{scaling['original_max_position_embeddings']}); they have no form in a Hugging Face configuration"
        )
    return scaling


def _add_tensors(model: Model, stored: Dict[str, Tensor], path: Path) -> None:
    config = model.config
    dim, head_dim = config["hidden_size"], config["head_dim"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    ffn, vocab = config["intermediate_size"], config["vocab_size"]
    wide = {
        "attn_q": (heads["attn_q"] * head_dim, dim), "attn_k": (heads["attn_k"] * head_dim, dim),
        "attn_v": (heads["attn_k"] * head_dim, dim), "attn_output": (dim, heads["attn_q"] * head_dim),
        "ffn_gate": (ffn, dim), "ffn_up": (ffn, dim), "ffn_down": (dim, ffn),
        "attn_norm": (dim,), "ffn_norm": (dim,), "attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,),
    }  # fmt: skip
    outer = {"token_embd.weight": (vocab, dim), "output_norm.weight": (dim,), "output.weight": (vocab, dim)}
    for name, tensor in stored.items():
        if name == "rope_freqs.weight":
            continue
        match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)", name)
        if name in OUTER:
            expected, target = outer[name], OUTER[name]
        elif match and match.group(2) in INNER and int(match.group(1)) < config["num_hidden_layers"]:
            layer, stem, kind = match.groups()
            expected = wide[stem] if kind == "weight" else wide[stem][:1]
            target = f"model.layers.{int(layer)}.{INNER[stem]}.{kind}"
            if stem in heads and tensor.shape == expected and config["model_type"] in ("llama", "mistral"):
                tensor = _halves(tensor, heads[stem])
        else:
            raise ConvertError(f"{tensor.where} is not known for the architecture '{config['model_type']}'")
        if tensor.shape != expected:
            raise ConvertError(f"{tensor.where} has the shape {list(tensor.shape)}; its header asks for {list(expected)}")
        model.tensors[target] = tensor
    needed = ["attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    needed += ["attn_q_norm", "attn_k_norm"] if config["model_type"] == "qwen3" else []
    for layer in range(config["num_hidden_layers"]):
        for stem in needed:
            if f"model.layers.{layer}.{INNER[stem]}.weight" not in model.tensors:
                raise ConvertError(f"{path}: the tensor 'blk.{layer}.{stem}.weight' is missing")
        biases = ["attn_q", "attn_k", "attn_v"] if config["model_type"] == "qwen2" or config.get("attention_bias") else []
        for stem in biases:
            if f"model.layers.{layer}.{INNER[stem]}.bias" not in model.tensors:
                raise ConvertError(f"{path}: the tensor 'blk.{layer}.{stem}.bias' is missing")
        if config.get("attention_bias"):  # Hugging Face's Llama then has one on the output, too
            zeros = Computed(f"{path}: zeros", "F32", (dim,), lambda: np.zeros(dim, "<f4"))
            model.tensors.setdefault(f"model.layers.{layer}.self_attn.o_proj.bias", zeros)


def _halves(tensor: Tensor, num_heads: int) -> Tensor:
    """llama.cpp stores the rotary pairs of a head interleaved; Hugging Face has them in halves."""

    def reorder() -> np.ndarray:
        rows = tensor.rows(0, tensor.num_rows)
        by_head = rows.reshape(num_heads, tensor.num_rows // num_heads // 2, 2, -1)
        return np.ascontiguousarray(by_head.swapaxes(1, 2)).reshape(tensor.shape)

    return Computed(tensor.where, tensor.dtype, tensor.shape, reorder)


# ---- tokenizer ----


def _add_tokenizer(model: Model, keys: Keys) -> None:
    fields = keys.all
    kind = fields.text("tokenizer.ggml.model", "none")
    tokens = _list(fields, "tokenizer.ggml.tokens", str)
    types = _list(fields, "tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(tokens) > model.config["vocab_size"]:
        raise ConvertError(
            f"{keys.where}: has {len(tokens)} tokens with {len(types)} types for {model.config['vocab_size']} embeddings"
        )
    if kind == "gpt2":
        pre = fields.text("tokenizer.ggml.pre", "default")
        if pre not in PRE_TOKENIZERS:
            raise ConvertError(
                f"{keys.where}: tokenizer.ggml.pre is '{short(pre)}'; known are {', '.join(PRE_TOKENIZERS)} (give --tokenizer=FILE)"
            )
        add_bos = fields.boolean("tokenizer.ggml.add_bos_token", pre in LLAMA3)
        model.files["tokenizer.json"] = _bpe(tokens, types, _list(fields, "tokenizer.ggml.merges", str), pre, model, add_bos)
        name = "PreTrainedTokenizerFast"
    elif kind == "llama":
        scores = _list(fields, "tokenizer.ggml.scores", float) or [0.0] * len(tokens)
        if len(scores) != len(tokens):
            raise ConvertError(f"{keys.where}: has {len(tokens)} tokens and {len(scores)} scores")
        add_bos = fields.boolean("tokenizer.ggml.add_bos_token", True)
        model.files["tokenizer.model"] = sentencepiece_model(tokens, scores, types, fields)
        name = "LlamaTokenizer"
    else:
        model.notes.append(f"the tokenizer '{short(kind)}' is not known here; the model takes token ids only, or give --tokenizer")
        return
    _add_settings(model, fields, tokens, name, add_bos)


def _list(fields: Fields, key: str, kind: type) -> List[Any]:
    value = fields.document.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, (int, float) if kind is float else kind) for item in value):
        raise ConvertError(f"{fields.where}: {key} is not a list of {kind.__name__}")
    return value


def _add_settings(model: Model, fields: Fields, tokens: List[str], name: str, add_bos: bool) -> None:
    settings: Dict[str, Any] = {
        "tokenizer_class": name,
        "add_bos_token": add_bos,
        "add_eos_token": fields.boolean("tokenizer.ggml.add_eos_token", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config["max_position_embeddings"],
    }
    generation: Dict[str, Any] = {}
    for key, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.integer(f"tokenizer.ggml.{theirs}_token_id", 0, 1 << 31, -1)
        if 0 <= index < len(tokens):
            settings[f"{key}_token"] = tokens[index]
            if key != "unk":
                generation[f"{key}_token_id"] = index
    end_of_turn = fields.integer("tokenizer.ggml.eot_token_id", 0, 1 << 31, -1)
    if 0 <= end_of_turn < len(tokens) and generation.get("eos_token_id") not in (None, end_of_turn):
        generation["eos_token_id"] = [generation["eos_token_id"], end_of_turn]
    template = fields.text("tokenizer.chat_template", "")
    if template:
        model.files["chat_template.jinja"] = template.encode("utf-8", "replace")
    model.files["tokenizer_config.json"] = _json(settings)
    if generation:
        model.files["generation_config.json"] = _json(generation)


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _bpe(tokens: List[str], types: List[int], merges: List[str], pre: str, model: Model, add_bos: bool) -> bytes:
    """tokenizer.json of a byte-level BPE."""
    vocab: Dict[str, int] = {}
    added = []
    for index, (token, kind) in enumerate(zip(tokens, types)):
        if kind == UNUSED:  # padding of the embeddings
            continue
        if token in vocab:
            raise ConvertError(f"{model.source.folder}: the token '{short(token)}' appears twice in the vocabulary")
        vocab[token] = index
        if kind in (CONTROL, USER_DEFINED):
            added.append({"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": kind == CONTROL})  # fmt: skip
    for merge in merges:
        if merge.count(" ") != 1:
            raise ConvertError(f"{model.source.folder}: the merge '{short(merge)}' is not two tokens")
    processor: Dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    bos = model.config.get("bos_token_id")
    if add_bos and bos is not None and bos < len(tokens):
        first = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
        template = {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": tokens[bos], "type_id": 1}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
        }  # fmt: skip
        processor = {"type": "Sequence", "processors": [processor, template]}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre in LLAMA3, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    return _json(document)


def sentencepiece_model(tokens: List[str], scores: List[float], types: List[int], fields: Fields) -> bytes:
    """A SentencePiece ModelProto (BPE with byte fallback, as Llama's) in protocol buffer wire form."""

    def varint(value: int) -> bytes:
        out = bytearray()
        value &= (1 << 64) - 1
        while value >= 128:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
        return bytes(out)

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    def data(field: int, value: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(value)) + value

    parts = []
    for token, score, kind in zip(tokens, scores, types):
        piece = data(1, token.encode("utf-8", "surrogateescape")) + varint(2 << 3 | 5) + struct.pack("<f", score)
        parts.append(data(1, piece + (number(3, kind) if kind in (UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE) else b"")))

    def identity(name: str, default: int) -> int:
        return fields.integer(f"tokenizer.ggml.{name}_token_id", 0, 1 << 31, default)

    unknown = next((index for index, kind in enumerate(types) if kind == UNKNOWN), identity("unknown", 0))
    trainer = number(3, 2) + number(4, len(tokens)) + number(35, int(BYTE in types))  # BPE; vocabulary; byte fallback
    # vocabulary_output_piece_score and the like are about training; ids say which pieces are which.
    trainer += number(40, unknown) + number(41, identity("bos", 1)) + number(42, identity("eos", 2)) + number(43, -1)
    trainer += data(44, b" \xe2\x81\x87 ")  # how the unknown piece is shown
    normalizer = data(1, b"identity")
    charsmap = fields.document.get("tokenizer.ggml.precompiled_charsmap")
    if isinstance(charsmap, list) and all(isinstance(value, int) for value in charsmap):
        normalizer += data(2, bytes(value & 255 for value in charsmap))
    normalizer += number(3, int(fields.boolean("tokenizer.ggml.add_space_prefix", True)))
    normalizer += number(4, int(fields.boolean("tokenizer.ggml.remove_extra_whitespaces", False)))
    normalizer += number(5, 1)
    return b"".join(parts) + data(2, trainer) + data(3, normalizer)
