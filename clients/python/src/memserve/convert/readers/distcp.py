"""Distributed checkpoints (torch.distributed.checkpoint): `.metadata`, a pickle that says where every chunk of every tensor lies, and
*.distcp files in which each chunk is a tensor in torch.save's zip form."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np

from memserve.convert import dtypes
from memserve.convert.errors import ConvertError, short
from memserve.convert.files import Source
from memserve.convert.readers import pickle_data, torch_zip
from memserve.convert.readers.pickle_data import DTYPES, Dtype, Record, View
from memserve.convert.tensor import Shape, Tensor, check_shape

MAX_CHUNKS = 1 << 16  # of one tensor
METADATA = "torch.distributed.checkpoint.metadata."


class Chunk(NamedTuple):
    offsets: Shape
    shape: Shape
    tensor: Tensor


class ChunkedTensor(Tensor):
    def __init__(self, where: str, dtype: str, shape: Shape, chunks: List[Chunk]):
        super().__init__(where, dtype, shape)
        self._chunks = chunks

    def rows(self, begin: int, end: int) -> np.ndarray:
        if not self.shape:
            return self._chunks[0].tensor.rows(begin, end)
        out = np.zeros((end - begin,) + self.shape[1:], dtypes.NUMPY[self.dtype])
        for offsets, shape, tensor in self._chunks:
            low, high = max(begin, offsets[0]), min(end, offsets[0] + shape[0])
            if low >= high:
                continue
            part = tensor.rows(low - offsets[0], high - offsets[0]).reshape((high - low,) + shape[1:])
            place = (slice(low - begin, high - begin),) + tuple(slice(o, o + s) for o, s in zip(offsets[1:], shape[1:]))
            out[place] = part
        return out.reshape(end - begin, self.row_elements)

    def release(self) -> None:
        for chunk in self._chunks:
            chunk.tensor.release()


def _state(record: Any, kind: str, where: str) -> Record:
    if not isinstance(record, Record) or record.kind != METADATA + kind or not isinstance(record.state, dict):
        raise ConvertError(f"{where} is not {kind}, as torch.distributed.checkpoint writes it")
    return record


def _size(value: Any, where: str) -> Shape:
    if isinstance(value, Record) and value.kind == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, (tuple, list)):
        raise ConvertError(f"{where} has no size")
    return check_shape(where, value)


def read_folder(source: Source, prefix: str) -> Dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it; all of them where none does."""
    path = source.folder / ".metadata"
    metadata = _state(pickle_data.load(source.read(".metadata", pickle_data.MAX_PICKLE_BYTES), str(path)), "Metadata", str(path))
    described, stored = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise ConvertError(f"{path} does not say where its tensors are")
    places: Dict[Tuple[str, Shape], Record] = {}
    for index, info in stored.items():
        if not isinstance(index, Record) or not isinstance(index.get("fqn"), str):
            raise ConvertError(f"{path}: a place has no name")
        offset = index.get("offset")
        if offset is not None:
            places[index.get("fqn"), _size(offset, f"{path}: '{short(index.get('fqn'))}'")] = info
    names = [name for name in described if isinstance(name, str)]
    chosen = [name for name in names if name.startswith(prefix)]
    tensors: Dict[str, Tensor] = {}
    for name in chosen or names:
        record = described[name]
        if isinstance(record, Record) and record.kind == METADATA + "TensorStorageMetadata":
            tensors[name[len(prefix) :] if chosen else name] = _tensor(
                source, name, record, places, f"{path}: tensor '{short(name)}'"
            )
    return tensors


def _tensor(source: Source, name: str, record: Record, places: Dict[Tuple[str, Shape], Record], where: str) -> Tensor:
    properties = record.get("properties")
    state = properties.state if isinstance(properties, Record) else None
    kind = (
        state[0]
        if isinstance(state, (tuple, list)) and state
        else properties.get("dtype")
        if isinstance(properties, Record)
        else None
    )
    dtype = DTYPES.get(kind.name, kind.name) if isinstance(kind, Dtype) else ""
    if dtype not in dtypes.NUMPY:
        raise ConvertError(f"{where} has the type {short(dtype or 'unknown')}; known are {', '.join(dtypes.NUMPY)}")
    shape = _size(record.get("size"), where)
    listed = record.get("chunks")
    if not isinstance(listed, list) or not 0 < len(listed) <= MAX_CHUNKS:
        raise ConvertError(f"{where} has no chunks, or more than {MAX_CHUNKS}")
    chunks: List[Chunk] = []
    covered = 0
    for item in listed:
        chunk = _state(item, "ChunkStorageMetadata", where)
        offsets, sizes = _size(chunk.get("offsets"), where), _size(chunk.get("sizes"), where)
        fits = len(offsets) == len(sizes) == len(shape) and all(o + s <= whole for o, s, whole in zip(offsets, sizes, shape))
        if not fits:
            raise ConvertError(f"{where} has a chunk {list(sizes)} at {list(offsets)}; its shape is {list(shape)}")
        if 0 in sizes:
            continue
        for other in chunks if len(listed) <= 4096 else ():
            if all(o < p + t and p < o + s for o, s, p, t in zip(offsets, sizes, other.offsets, other.shape)):
                raise ConvertError(f"{where} has chunks that overlap at {list(offsets)}")
        chunks.append(
            Chunk(
                offsets, sizes, _LazyChunk(source, f"{where} chunk at {list(offsets)}", dtype, sizes, places.get((name, offsets)))
            )
        )
        elements = 1
        for size in sizes:
            elements *= size
        covered += elements
    whole = ChunkedTensor(where, dtype, shape, chunks)
    if covered != (0 if 0 in shape else whole.elements):
        raise ConvertError(f"{where} has chunks for {covered} of its {whole.elements} elements")
    return whole


class _LazyChunk(Tensor):
    """Opened at its first read: a checkpoint may have tens of thousands."""

    def __init__(self, source: Source, where: str, dtype: str, shape: Shape, info: Any):
        super().__init__(where, dtype, shape)
        if not isinstance(info, Record) or not isinstance(info.state, dict):
            raise ConvertError(f"{where} is not stored anywhere")
        path, offset, length = (info.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(path, str) or type(offset) is not int or type(length) is not int:
            raise ConvertError(f"{where} has no place in a file")
        if info.get("transform_descriptors"):
            raise ConvertError(f"{where} is stored in a transformed (compressed) form, which is not read")
        self._file = source.open(path)
        self._offset, self._length = offset, length
        self._tensor: Any = None

    def rows(self, begin: int, end: int) -> np.ndarray:
        if self._tensor is None:
            archive = torch_zip.Archive(self._file, self._offset, self._length)
            view = archive.pickle()
            if not isinstance(view, View):
                raise ConvertError(f"{archive.where}: {self.where.rsplit(': ', 1)[-1]} is not a tensor")
            tensor = archive.tensor(view, self.where.rsplit(": ", 1)[-1])
            if tensor.shape != self.shape or tensor.dtype != self.dtype:
                raise ConvertError(
                    f"{tensor.where} is {tensor.dtype} {list(tensor.shape)}; .metadata says {self.dtype} {list(self.shape)}"
                )
            self._tensor = tensor
        return self._tensor.rows(begin, end)

    def release(self) -> None:
        self._tensor = None
