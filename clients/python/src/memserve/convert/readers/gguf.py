"""GGUF files (llama.cpp): keys and values, then tensors in ggml's types. The header is read here, within bounds; blocks of quantised
weights are widened by the gguf package."""

from __future__ import annotations

import struct
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from memserve.convert.errors import ConvertError, short
from memserve.convert.files import SourceFile
from memserve.convert.readers.safetensors import FileTensor
from memserve.convert.tensor import Shape, Tensor, check_shape

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_ARRAY = 1 << 24
MAX_STRING = 64 << 20
WINDOW = 1 << 20


class BlockType(NamedTuple):
    name: str
    elements: int  # of a block
    nbytes: int


TYPES = {
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18), 3: BlockType("Q4_1", 32, 20), 6: BlockType("Q5_0", 32, 22), 7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34), 12: BlockType("Q4_K", 256, 144), 13: BlockType("Q5_K", 256, 176), 14: BlockType("Q6_K", 256, 210),
}  # fmt: skip
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


class _Cursor:
    """Reads forward through windows of the file."""

    def __init__(self, file: SourceFile):
        self._file = file
        self._window = b""
        self._begin = 0
        self.at = 0

    def take(self, size: int, what: str) -> bytes:
        if self.at + size > self._file.size:
            raise ConvertError(f"{self._file.path}: {what} ends at byte {self.at + size}; the file has {self._file.size}")
        offset = self.at - self._begin
        if offset + size > len(self._window):
            self._begin, offset = self.at, 0
            self._window = bytes(self._file.read(self.at, min(max(size, WINDOW), self._file.size - self.at)))
        self.at += size
        return self._window[offset : offset + size]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        size = self.number("<Q", what)
        if size > MAX_STRING:
            raise ConvertError(f"{self._file.path}: {what} is a string of {size} bytes; at most {MAX_STRING} make sense")
        return self.take(size, what).decode("utf-8", "surrogateescape")


class BlockTensor(Tensor):
    """Rows of quantised blocks, widened to float32."""

    def __init__(self, file: SourceFile, where: str, kind: BlockType, shape: Shape, offset: int):
        super().__init__(where, "F32", shape)
        self._file = file
        self._offset = offset
        self._kind = kind
        self._row_bytes = shape[-1] // kind.elements * kind.nbytes
        for size in shape[1:-1]:
            self._row_bytes *= size
        self._widen: Optional[Callable[[np.ndarray], np.ndarray]] = None

    def rows(self, begin: int, end: int) -> np.ndarray:
        if self._widen is None:
            self._widen = _widen(self._kind.name)
        data = self._file.read(self._offset + begin * self._row_bytes, (end - begin) * self._row_bytes, self.where)
        blocks = np.frombuffer(data, np.uint8).reshape(end - begin, self._row_bytes)
        with np.errstate(all="ignore"):  # what is not finite is counted by the writer
            wide = self._widen(blocks)
        return np.ascontiguousarray(wide, "<f4").reshape(end - begin, self.row_elements)


def _widen(name: str) -> Callable[[np.ndarray], np.ndarray]:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise ConvertError(f"the file has {name} blocks; widening them needs the gguf package: pip install gguf") from None
    kind = GGMLQuantizationType[name]
    return lambda blocks: quants.dequantize(blocks, kind)


def read(file: SourceFile) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
    path = str(file.path)
    cursor = _Cursor(file)
    if file.size < 24 or cursor.take(4, "the magic number") != b"GGUF":
        raise ConvertError(f"{path} is no GGUF file")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        raise ConvertError(f"{path} has the GGUF version {version}; 2 and 3 (little-endian) are read")
    num_tensors, num_keys = cursor.number("<Q", "the header"), cursor.number("<Q", "the header")
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise ConvertError(
            f"{path} claims {num_tensors} tensors and {num_keys} keys; at most {MAX_TENSORS} and {MAX_KEYS} make sense"
        )
    fields: Dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a key")
        if key in fields:
            raise ConvertError(f"{path}: the key '{short(key)}' appears twice")
        fields[key] = _value(cursor, cursor.number("<I", key), path, key)
    described: List[Tuple[str, Shape, BlockType, int]] = []
    names = set()
    for _ in range(num_tensors):
        name = cursor.string("a tensor's name")
        where = f"{path}: tensor '{short(name)}'"
        axes = cursor.number("<I", where)
        if axes > 8:
            raise ConvertError(f"{where} has {axes} axes")
        shape = check_shape(where, [cursor.number("<Q", where) for _ in range(axes)][::-1])
        kind, offset = cursor.number("<I", where), cursor.number("<Q", where)
        if kind not in TYPES:
            raise ConvertError(f"{where} has the ggml type {kind}; known are {', '.join(t.name for t in TYPES.values())}")
        if name in names:
            raise ConvertError(f"{where} appears twice")
        names.add(name)
        described.append((name, shape, TYPES[kind], offset))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise ConvertError(f"{path}: general.alignment is {short(alignment)}")
    return fields, _tensors(file, described, -(-cursor.at // alignment) * alignment)


def _value(cursor: _Cursor, kind: int, path: str, key: str) -> Any:
    where = f"the value of '{short(key)}'"
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], where)
    if kind == STRING:
        return cursor.string(where)
    if kind != ARRAY:
        raise ConvertError(f"{path}: {where} has the type {kind}, which GGUF does not have")
    item, count = cursor.number("<I", where), cursor.number("<Q", where)
    if count > MAX_ARRAY or (item not in SCALARS and item != STRING):
        raise ConvertError(f"{path}: {where} is an array of {count} values of type {item}")
    if item == STRING:
        return [cursor.string(where) for _ in range(count)]
    form = SCALARS[item]
    return list(struct.unpack(f"<{count}{form[1]}", cursor.take(count * struct.calcsize(form), where)))


def _tensors(file: SourceFile, described: List[Tuple[str, Shape, BlockType, int]], data: int) -> Dict[str, Tensor]:
    tensors: Dict[str, Tensor] = {}
    places = []
    for name, shape, kind, offset in described:
        where = f"{file.path}: tensor '{short(name)}'"
        width = shape[-1] if shape else 1
        if width % kind.elements:
            raise ConvertError(f"{where} has rows of {width}; {kind.name} needs a multiple of {kind.elements}")
        elements = 1
        for size in shape:
            elements *= size
        nbytes = elements // kind.elements * kind.nbytes
        if data + offset + nbytes > file.size:
            raise ConvertError(f"{where} ends at byte {data + offset + nbytes}; the file has {file.size}")
        if kind.elements == 1:
            tensors[name] = FileTensor(file, where, kind.name, shape, data + offset)
        else:
            tensors[name] = BlockTensor(file, where, kind, shape, data + offset)
        if nbytes:
            places.append((offset, offset + nbytes, name))
    places.sort()
    for (_, end, name), (begin, _, following) in zip(places, places[1:]):
        if begin < end:
            raise ConvertError(f"{file.path}: the tensors '{short(name)}' and '{short(following)}' overlap at byte {begin}")
    return tensors
