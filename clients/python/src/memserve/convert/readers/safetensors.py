"""safetensors files: 8 bytes with the length of a JSON header, the header, the data."""

from __future__ import annotations

from typing import Dict

import numpy as np

from memserve.convert import dtypes
from memserve.convert.errors import ConvertError, short
from memserve.convert.files import Source, SourceFile, parse_json
from memserve.convert.tensor import Shape, Tensor, check_shape

MAX_HEADER_BYTES = 100_000_000
MAX_NAME = 512


class FileTensor(Tensor):
    """Row-major bytes at one place of a file."""

    def __init__(self, file: SourceFile, where: str, dtype: str, shape: Shape, offset: int):
        super().__init__(where, dtype, shape)
        self._file = file
        self._offset = offset

    def rows(self, begin: int, end: int) -> np.ndarray:
        row_bytes = self.row_elements * dtypes.NUMPY[self.dtype].itemsize
        data = self._file.read(self._offset + begin * row_bytes, (end - begin) * row_bytes, self.where)
        return np.frombuffer(data, dtypes.NUMPY[self.dtype]).reshape(end - begin, self.row_elements)


def read(file: SourceFile) -> Dict[str, Tensor]:
    path = str(file.path)
    if file.size < 8:
        raise ConvertError(f"{path} has {file.size} bytes; a safetensors file begins with 8 that give the length of its header")
    header_bytes = int.from_bytes(file.read(0, 8), "little")
    if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > file.size:
        raise ConvertError(f"{path}: the header claims {header_bytes} bytes; the file has {file.size}")
    header = parse_json(bytes(file.read(8, header_bytes)), f"{path}: header")
    header.pop("__metadata__", None)
    data_bytes = file.size - 8 - header_bytes
    tensors: Dict[str, Tensor] = {}
    places = []
    for name, entry in header.items():
        where = f"{path}: tensor '{short(name)}'"
        if not name or len(name) > MAX_NAME:
            raise ConvertError(f"{where}: names have 1 to {MAX_NAME} characters")
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise ConvertError(f"{where} has no shape")
        dtype = entry.get("dtype")
        if dtype not in dtypes.NUMPY:
            raise ConvertError(f"{where} has the type {short(dtype)}; known are {', '.join(dtypes.NUMPY)}")
        shape = check_shape(where, entry["shape"])
        offsets = entry.get("data_offsets")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)):
            raise ConvertError(f"{where} has no data_offsets")
        begin, end = offsets
        if not 0 <= begin <= end <= data_bytes:
            raise ConvertError(f"{where} lies at bytes {begin} to {end}; the data has {data_bytes}")
        tensor = FileTensor(file, where, dtype, shape, 8 + header_bytes + begin)
        if (0 if 0 in shape else tensor.nbytes) != end - begin:
            raise ConvertError(f"{where} has {end - begin} bytes; {dtype} {list(shape)} needs {tensor.nbytes}")
        tensors[name] = tensor
        if end > begin:
            places.append((begin, end, name))
    places.sort()
    for (_, end, name), (begin, _, following) in zip(places, places[1:]):
        if begin < end:
            raise ConvertError(f"{path}: the tensors '{short(name)}' and '{short(following)}' overlap at byte {begin}")
    return tensors


def read_folder(source: Source, stem: str = "model") -> Dict[str, Tensor]:
    """model.safetensors, or the files that its index names."""
    index_name = f"{stem}.safetensors.index.json"
    if not source.has(index_name):
        return read(source.open(f"{stem}.safetensors"))
    return read_index(source, index_name, read)


def read_index(source: Source, index_name: str, reader) -> Dict[str, Tensor]:
    path = source.folder / index_name
    weight_map = source.json(index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConvertError(f"{path}: weight_map is not an object of names")
    shards = {name: reader(source.open(name)) for name in sorted(set(weight_map.values()))}
    tensors: Dict[str, Tensor] = {}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise ConvertError(f"{path}: '{short(tensor)}' should be in {short(shard)}, which does not have it")
        tensors[tensor] = shards[shard][tensor]
    for shard, content in shards.items():
        for tensor in content:
            if weight_map.get(tensor) != shard:
                raise ConvertError(f"{source.folder / shard}: holds '{short(tensor)}', which {index_name} does not place there")
    return tensors
