#!/usr/bin/env python3
"""Converts reference vectors (see README.md) into the checkpoints and expectations that the tests read.

  tests/golden/convert.py FOLDER        FOLDER/CASE/{consolidated/…, expected.json, expected.safetensors}
                                        -> tests/golden/CASE/{checkpoint/…, expected.json, expected.safetensors}

Standard library only. The pickle inside a checkpoint is read by an unpickler that knows three names and runs nothing.
"""

import argparse
import collections
import json
import math
import pathlib
import pickle
import shutil
import struct
import sys
import zipfile

# torch's name of a storage -> safetensors' name of its elements, bytes of one
STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
}

# A view of a storage, as the pickle describes it.
Tensor = collections.namedtuple("Tensor", "storage offset shape stride")


def rebuild_tensor(storage, offset, shape, stride, *_):
    return Tensor(storage, offset, tuple(shape), tuple(stride))


class CheckpointUnpickler(pickle.Unpickler):
    """Reads tensors as descriptions. A global that is not listed here is refused, so nothing is ever executed."""

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name  # only a marker: persistent_load gets it back
        raise pickle.UnpicklingError(f"a checkpoint has no business with {module}.{name}")

    def persistent_load(self, pid):
        kind, storage, key, _device, _elements = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        return storage, key


def read_torch(path):
    """The tensors under "model": name -> (dtype, shape, row-major bytes, where they lie in the file)."""
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickled[: -len("data.pkl")]
        with archive.open(pickled) as file:
            model = CheckpointUnpickler(file).load()["model"]
        tensors = {}
        for name, tensor in model.items():
            storage, key = tensor.storage
            dtype, size = STORAGES[storage]
            contiguous = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
            if list(tensor.stride) != contiguous:
                raise ValueError(f"{path}: {name} is a strided view, which no case has so far")
            begin = tensor.offset * size
            data = archive.read(f"{folder}data/{key}")[begin : begin + math.prod(tensor.shape) * size]
            tensors[name] = (dtype, tensor.shape, data, (key, begin))
    return tensors


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, (dtype, shape, data, _) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data starts at a multiple of 64
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data, _ in tensors.values():
            file.write(data)


MODEL_KEYS = (
    "dim", "n_layers", "head_dim", "n_heads", "n_kv_heads", "ffn_dim_multiplier", "multiple_of", "norm_eps",
    "rope_theta", "max_seqlen", "vocab_size", "weight_tying", "sliding_window",
)  # fmt: skip

TOKENIZERS = {"bytes": "bytes", "sp": "sentencepiece", "tiktoken": "tiktoken"}


def convert(source, target):
    params = json.loads((source / "consolidated/params.json").read_text())
    tokenizer = TOKENIZERS[params["data"]["tokenizer"]["name"]]
    model = params["model"]
    config = {"model_type": "memory_llama"}
    config.update({key: model[key] for key in MODEL_KEYS})
    config["productkey_args"] = model["productkey_args"]
    config["tokenizer"] = tokenizer

    tensors = read_torch(source / "consolidated/consolidated.pth")
    if model["weight_tying"]:
        output, embeddings = tensors.pop("output.weight"), tensors["tok_embeddings.weight"]
        if output[2] != embeddings[2]:
            raise ValueError(f"{source}: weight_tying, but output.weight is not tok_embeddings.weight")

    checkpoint = target / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_safetensors(checkpoint / "model.safetensors", tensors)
    if tokenizer in ("sentencepiece", "tiktoken"):
        shutil.copyfile(source / "consolidated/tokenizer.model", checkpoint / "tokenizer.model")
    for name in ("expected.json", "expected.safetensors"):
        shutil.copyfile(source / name, target / name)
    size = sum(len(data) for _, _, data, _ in tensors.values())
    print(f"{target.name}: {len(tensors)} tensors, {size} bytes, tokenizer {tokenizer}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="the folder with the reference vectors")
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="default: this folder")
    arguments = parser.parse_args()
    cases = sorted(path.parent.parent for path in arguments.folder.glob("*/consolidated/params.json"))
    if not cases:
        sys.exit(f"{arguments.folder} has no CASE/consolidated/params.json")
    for source in cases:
        convert(source, arguments.to / source.name)


if __name__ == "__main__":
    main()
