"""Finds out what a source is."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from memserve.convert.errors import ConvertError
from memserve.convert.families import gguf, huggingface, native, original, peer, sparse_memory_lm
from memserve.convert.files import Source
from memserve.convert.model import Model


def open_model(path: Path, tokenizer: Optional[Path] = None) -> Model:
    if path.is_file():
        return _file(path, tokenizer)
    if not path.is_dir():
        raise ConvertError(f"{path} does not exist")
    source = Source(path)
    if original.recognises(source):
        return original.read(source, tokenizer)
    models = [name for name in source.names() if name.endswith(".gguf")]
    if len(models) == 1 and not source.has("config.json"):
        return gguf.read(path / models[0], tokenizer)
    if source.has("consolidated/params.json"):
        return open_model(path / "consolidated", tokenizer)
    if source.has("config.json"):
        config = source.json("config.json")
        if config.get("model_type") == "memory_llama":
            return native.read(source, tokenizer)
        return peer.read(source, tokenizer) if peer.recognises(config) else huggingface.read(source, tokenizer)
    weights = sparse_memory_lm.recognises(source)
    if weights is not None:
        return sparse_memory_lm.read(source, weights, tokenizer)
    raise _unknown(path)


def _unknown(path: Path) -> ConvertError:
    return ConvertError(f"{path} is no checkpoint that is known here; memserve-convert --help says what is")


def _file(path: Path, tokenizer: Optional[Path]) -> Model:
    if path.suffix == ".gguf":
        return gguf.read(path, tokenizer)
    if path.name in ("consolidated.pth", "params.json", "config.json"):
        return open_model(path.parent, tokenizer)
    if path.suffix == ".pt":
        return sparse_memory_lm.read(Source(path.parent), path.name, tokenizer)
    raise _unknown(path)
