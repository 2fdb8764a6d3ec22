"""What the tests share: files in foreign forms, written by hand, and a command that runs the converter."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
GOLDEN = ROOT / "tests" / "golden"
SRC = HERE.parent / "src"
sys.path.insert(0, str(SRC))

try:
    import numpy as np
except ImportError:
    np = None


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="memserve-convert-"))
        self.addCleanup(shutil.rmtree, self.folder, True)

    def convert(self, source, *flags, name="out"):
        """Runs the converter in this process. Returns the folder it wrote."""
        from memserve.convert import cli

        arguments = cli.parser().parse_args([str(source), str(self.folder / name), "--quiet", *flags])
        options = cli.writer.Options(
            arguments.dtype, arguments.table_dtype, arguments.max_shard_bytes, arguments.threads, arguments.quiet
        )
        self.report = cli.convert(arguments.source, arguments.dest, options, arguments.tokenizer)
        return self.folder / name

    def fails(self, pattern, source, *flags, name="out"):
        from memserve.convert import ConvertError

        with self.assertRaisesRegex(ConvertError, pattern) as caught:
            self.convert(source, *flags, name=name)
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)


def run(*words, **options):
    environment = dict(os.environ, PYTHONPATH=str(SRC))
    return subprocess.run([sys.executable, "-m", "memserve.convert", *map(str, words)], env=environment, capture_output=True,
                          text=True, **options)  # fmt: skip


def read_safetensors(folder):
    """name -> (dtype, array), by a few independent lines rather than by the reader under test."""
    folder = pathlib.Path(folder)
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    tensors = {}
    for path in paths:
        blob = path.read_bytes()
        (size,) = struct.unpack("<Q", blob[:8])
        header = json.loads(blob[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            kinds = {"F32": "<f4", "BF16": "<u2", "F16": "<f2", "I8": "i1", "U8": "u1", "I32": "<i4", "F64": "<f8", "I64": "<i8"}
            array = np.frombuffer(blob[8 + size + begin : 8 + size + end], kinds[entry["dtype"]])
            tensors[name] = (entry["dtype"], array.reshape(entry["shape"]))
    return tensors


def widen(dtype, array):
    if dtype == "BF16":
        return (array.astype("<u4") << 16).view("<f4")
    return array.astype("<f4")


def write_safetensors(path, tensors, header_edit=None):
    """tensors: name -> (dtype, array)."""
    header, at = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    if header_edit:
        header_edit(header)
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for _, array in tensors.values())
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


# ---- torch's zip form, without torch ----


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """function(*args), in a pickle."""

    def __init__(self, function, *args):
        self.function, self.args = function, args


class TorchTensor:
    def __init__(self, array, kind=None, key=None, offset=0, stride=None, shape=None):
        kinds = {"f4": "FloatStorage", "f2": "HalfStorage", "u2": "BFloat16Storage", "f8": "DoubleStorage", "i8": "LongStorage"}
        self.array, self.kind = array, kind or kinds[array.dtype.str[1:]]
        self.key, self.offset, self.shape = key, offset, tuple(array.shape if shape is None else shape)
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        self.stride = tuple(strides[: len(self.shape)] if stride is None else stride)


def _pickled(value, storages):
    def dump(v):
        if v is None:
            return b"N"
        if v is True or v is False:
            return b"\x88" if v else b"\x89"
        if isinstance(v, int):
            return b"\x8a" + bytes([9]) + v.to_bytes(9, "little", signed=True)
        if isinstance(v, float):
            return b"G" + struct.pack(">d", v)
        if isinstance(v, str):
            data = v.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        if isinstance(v, list):
            return b"](" + b"".join(map(dump, v)) + b"e"
        if isinstance(v, tuple):
            return b"(" + b"".join(map(dump, v)) + b"t"
        if isinstance(v, dict):
            return b"}(" + b"".join(dump(k) + dump(w) for k, w in v.items()) + b"u"
        if isinstance(v, Global):
            return f"c{v.module}\n{v.name}\n".encode()
        if isinstance(v, Call):
            return dump(v.function) + dump(tuple(v.args)) + b"R"
        if isinstance(v, TorchTensor):
            key = v.key if v.key is not None else str(len(storages))
            storages.setdefault(key, v.array.tobytes())
            pid = dump(("storage", Global("torch", v.kind), key, "cpu", v.array.size)) + b"Q"
            inner = (
                b"(" + pid + b"".join(map(dump, (v.offset, v.shape, v.stride, False, Call(Global("collections", "OrderedDict")))))
            )
            return dump(Global("torch._utils", "_rebuild_tensor_v2")) + inner + b"tR"
        raise TypeError(v)

    return b"\x80\x02" + dump(value) + b"."


def write_torch(path, value, pickled=None, compression=zipfile.ZIP_STORED, prefix="archive/"):
    storages = {}
    data = _pickled(value, storages) if pickled is None else pickled
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(prefix + "data.pkl", data)
        archive.writestr(prefix + "byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"{prefix}data/{key}", content)
        archive.writestr(prefix + "version", "3\n")


HOSTILE = b"\x80\x02cposix\nsystem\nX\x21\x00\x00\x00touch memserve-convert-was-hacked\x85R."


# ---- GGUF ----


def write_gguf(path, fields, tensors):
    """fields: key -> value; tensors: name -> (ggml type, shape as rows first, bytes)."""

    def string(text):
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    def value(v):
        if isinstance(v, bool):
            return struct.pack("<I?", 7, v)
        if isinstance(v, int):
            return struct.pack("<Ii" if v < 0 else "<II", 5 if v < 0 else 4, v)
        if isinstance(v, float):
            return struct.pack("<If", 6, v)
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        if isinstance(v[0], str):
            return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
        if isinstance(v[0], float):
            return struct.pack("<IIQ", 9, 6, len(v)) + struct.pack(f"<{len(v)}f", *v)
        return struct.pack("<IIQ", 9, 5, len(v)) + struct.pack(f"<{len(v)}i", *v)

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, field in fields.items():
        out += string(key) + value(field)
    data = b""
    for name, (kind, shape, content) in tensors.items():
        out += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += content + b"\0" * (-len(content) % 32)
    pathlib.Path(path).write_bytes(out + b"\0" * (-len(out) % 32) + data)


requires_numpy = unittest.skipIf(np is None, "numpy is not installed")
