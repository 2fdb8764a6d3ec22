"""Which tokenizer a folder has, by its files."""

from __future__ import annotations

import binascii
import base64
from pathlib import Path
from typing import Dict, Optional, Tuple

from memserve.convert.errors import ConvertError
from memserve.convert.files import Source

MAX_TOKENIZER_BYTES = 256 << 20
NAMES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
         "generation_config.json", "vocab.json", "merges.txt", "added_tokens.json")  # fmt: skip


def kind_of_model(data: bytes) -> str:
    """tokenizer.model: "tiktoken" where it is lines of base64 and rank, else "sentencepiece" (a protocol buffer)."""
    line = data.split(b"\n", 1)[0].split()
    if len(line) == 2 and line[1].isdigit():
        try:
            base64.b64decode(line[0], validate=True)
            return "tiktoken"
        except (binascii.Error, ValueError):
            pass
    return "sentencepiece"


def from_option(path: Path) -> Tuple[Dict[str, bytes], str]:
    """The files that --tokenizer names, and the kind of tokenizer."""
    if path.is_dir():
        source, names = Source(path), [name for name in NAMES if (path / name).is_file() and name != "generation_config.json"]
        if not {"tokenizer.model", "tokenizer.json"} & set(names):
            raise ConvertError(f"{path} has neither tokenizer.model nor tokenizer.json")
    elif path.is_file():
        source, names = Source(path.parent), [path.name]
    else:
        raise ConvertError(f"{path} does not exist")
    files = {name: source.read(name, MAX_TOKENIZER_BYTES) for name in names}
    if path.is_file() and path.name not in ("tokenizer.model", "tokenizer.json"):
        only = files.pop(path.name)
        files["tokenizer.json" if only.lstrip()[:1] == b"{" else "tokenizer.model"] = only
    return files, kind(files)


def kind(files: Dict[str, bytes]) -> str:
    if "tokenizer.model" in files:
        return kind_of_model(files["tokenizer.model"])
    return "bpe" if "tokenizer.json" in files else "none"


def beside(source: Source) -> Dict[str, bytes]:
    """All tokenizer files of a folder."""
    return {name: source.read(name, MAX_TOKENIZER_BYTES) for name in NAMES if source.has(name)}


def find(source: Source, names: Tuple[str, ...]) -> Optional[bytes]:
    for name in names:
        if source.has(name):
            return source.read(name, MAX_TOKENIZER_BYTES)
    return None
