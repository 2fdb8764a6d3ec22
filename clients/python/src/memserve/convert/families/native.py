"""Folders that memserve serves already: read again to change types, or to shard."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from memserve.convert import quantize, shapes, tokenizers
from memserve.convert.errors import ConvertError
from memserve.convert.files import Source
from memserve.convert.model import Model
from memserve.convert.readers import safetensors
from memserve.convert.tensor import MappedRows


def read(source: Source, tokenizer: Optional[Path]) -> Model:
    where = str(source.folder / "config.json")
    config = dict(source.json("config.json"))
    model = Model("memserve folder", source, config, safetensors.read_folder(source))
    _mark_quantised(model, where)
    shapes.check(model, where)
    model.files.update(tokenizers.beside(source))
    if tokenizer is not None:
        files, config["tokenizer"] = tokenizers.from_option(tokenizer)
        model.files.update(files)
    return model


def _mark_quantised(model: Model, where: str) -> None:
    """Quantised tables are kept as they are, unless widen() is called."""
    wanted, tables, _ = shapes.expected(model.config, where)
    for name in sorted(tables & set(model.tensors)):
        codes = model.tensors[name]
        scale = f"{name[: -len('.weight')]}.scale"
        if codes.dtype not in ("I8", "U8"):
            continue
        rows, width = wanted[name]
        stored = (rows, width if codes.dtype == "I8" else (width + 1) // 2)
        if codes.shape != stored:
            raise ConvertError(
                f"{codes.where} has the shape {list(codes.shape)}; {codes.dtype} rows of {width} ask for {list(stored)}"
            )
        if scale not in model.tensors or model.tensors[scale].shape != (rows,) or model.tensors[scale].dtype != "F32":
            raise ConvertError(f"{codes.where} needs '{scale}', F32 [{rows}], beside it")
        model.exact |= {name, scale}


def widen(model: Model) -> None:
    """Turns tables that are quantised already into floating point, so that they can take another type."""
    wanted, _, _ = shapes.expected(model.config, "config.json")
    for name in sorted(model.exact & model.tables):
        codes, scales = model.tensors[name], model.tensors.pop(f"{name[: -len('.weight')]}.scale")
        shape = wanted[name]
        model.tensors[name] = MappedRows(
            (codes, scales), "F32", shape, lambda c, s, width=shape[1]: quantize.dequantize(c, s, width)
        )
        model.exact -= {name}
