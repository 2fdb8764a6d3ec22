"""torch.save's zip form: a pickle (data.pkl) that describes tensors as views of storages, and a plain file for each storage."""

from __future__ import annotations

import struct
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from memserve.convert import dtypes
from memserve.convert.errors import ConvertError, short
from memserve.convert.files import SourceFile
from memserve.convert.readers import pickle_data
from memserve.convert.readers.pickle_data import View
from memserve.convert.readers.safetensors import FileTensor
from memserve.convert.tensor import Computed, Tensor, check_shape

MAX_ENTRIES = 1 << 20
MAX_DIRECTORY_BYTES = 256 << 20


class Entry(NamedTuple):
    offset: int  # of the data, in the file
    size: int


class Archive:
    """A zip at [begin, begin + size) of a file. Entries of torch are stored as they are, so a compressed one is refused; there is
    nothing to unpack that could be larger than it looks."""

    def __init__(self, file: SourceFile, begin: int = 0, size: Optional[int] = None):
        self.file = file
        self.begin = begin
        self.size = file.size - begin if size is None else size
        self.where = str(file.path) if begin == 0 and size is None else f"{file.path} at byte {begin}"
        if begin < 0 or self.size < 0 or begin + self.size > file.size:
            raise ConvertError(f"{self.where} should have {self.size} bytes; the file ends at {file.size}")
        self.entries = self._directory()
        pickles = [name for name in self.entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConvertError(f"{self.where} is a zip with {len(pickles)} files named data.pkl; torch.save writes one")
        self.prefix = pickles[0][: -len("data.pkl")]
        order = self.entries.get(self.prefix + "byteorder")
        if order is not None and self._read(order, 64) != b"little":
            raise ConvertError(f"{self.where} was written on a big-endian machine")

    def _read(self, entry: Entry, limit: int) -> bytes:
        if entry.size > limit:
            raise ConvertError(f"{self.where}: an entry has {entry.size} bytes; at most {limit} make sense")
        return bytes(self.file.read(entry.offset, entry.size))

    def _fail(self, message: str) -> ConvertError:
        return ConvertError(f"{self.where}: {message}")

    def _directory(self) -> Dict[str, Entry]:
        """The central directory at the end, with the entries' places."""
        head = bytes(self.file.read(self.begin, min(4, self.size)))
        if head != b"PK\x03\x04":
            if head[:1] == b"\x80":
                raise self._fail("is in torch's form from before 1.6; load it with torch and save it again with torch.save")
            raise self._fail("is not a zip, as torch.save writes it")
        tail_size = min(self.size, 65557)
        tail = bytes(self.file.read(self.begin + self.size - tail_size, tail_size))
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + 22 > len(tail):
            raise self._fail("is a zip without its directory; it is probably cut off")
        count, size, offset = struct.unpack("<HII", tail[at + 10 : at + 20])
        end = self.size - tail_size + at
        if 0xFFFF == count or 0xFFFFFFFF in (size, offset):
            if at < 20 or tail[at - 20 : at - 16] != b"PK\x06\x07":
                raise self._fail("is a large zip without its 64-bit directory")
            (place,) = struct.unpack("<Q", tail[at - 12 : at - 4])
            if place + 56 > self.size:
                raise self._fail(f"its directory should be at byte {place}; there are {self.size}")
            record = bytes(self.file.read(self.begin + place, 56))
            if record[:4] != b"PK\x06\x06":
                raise self._fail("is a large zip with a broken 64-bit directory")
            count, size, offset = struct.unpack("<QQQ", record[32:56])
            end = place
        if count > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES or offset + size > end:
            raise self._fail(f"its directory claims {count} entries in {size} bytes at {offset}; there are {end} bytes")
        return self._entries(bytes(self.file.read(self.begin + offset, size)), count, offset)

    def _entries(self, directory: bytes, count: int, limit: int) -> Dict[str, Entry]:
        entries: Dict[str, Entry] = {}
        places: List[Tuple[int, int, str]] = []
        at = 0
        for _ in range(count):
            if at + 46 > len(directory) or directory[at : at + 4] != b"PK\x01\x02":
                raise self._fail("its directory is broken")
            flags, method = struct.unpack("<HH", directory[at + 8 : at + 12])
            packed, size, name_size, extra_size, comment_size = struct.unpack("<IIHHH", directory[at + 20 : at + 34])
            (local,) = struct.unpack("<I", directory[at + 42 : at + 46])
            name_end = at + 46 + name_size
            name = directory[at + 46 : name_end].decode("utf-8", "replace")
            packed, size, local = self._wide(directory[name_end : name_end + extra_size], packed, size, local)
            at = name_end + extra_size + comment_size
            if name.endswith("/") and size == 0:
                continue
            if name in entries:
                raise self._fail(f"the entry '{short(name)}' appears twice")
            if method != 0 or packed != size:
                raise self._fail(f"the entry '{short(name)}' is compressed; torch.save does not do that")
            if flags & 1:
                raise self._fail(f"the entry '{short(name)}' is encrypted")
            if local + 30 > limit:
                raise self._fail(f"the entry '{short(name)}' should begin at byte {local}; the data ends at {limit}")
            header = bytes(self.file.read(self.begin + local, 30))
            if header[:4] != b"PK\x03\x04":
                raise self._fail(f"the entry '{short(name)}' should begin at byte {local}; there is something else")
            skipped = 30 + sum(struct.unpack("<HH", header[26:30]))
            if local + skipped + size > limit:
                raise self._fail(f"the entry '{short(name)}' should end at byte {local + skipped + size}; the data ends at {limit}")
            entries[name] = Entry(self.begin + local + skipped, size)
            places.append((local, local + skipped + size, name))
        places.sort()
        for (_, end, name), (begin, _, following) in zip(places, places[1:]):
            if begin < end:
                raise self._fail(f"the entries '{short(name)}' and '{short(following)}' overlap at byte {begin}")
        return entries

    def _wide(self, extra: bytes, packed: int, size: int, local: int) -> Tuple[int, int, int]:
        """Sizes and place, from the 64-bit field where they do not fit 32."""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack("<HH", extra[at : at + 4])
            field = extra[at + 4 : at + 4 + length]
            at += 4 + length
            if kind != 1:
                continue
            values = list(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            try:
                if size == 0xFFFFFFFF:
                    size = values.pop(0)
                if packed == 0xFFFFFFFF:
                    packed = values.pop(0)
                if local == 0xFFFFFFFF:
                    local = values.pop(0)
            except IndexError:
                raise self._fail("its directory is broken") from None
        return packed, size, local

    def pickle(self) -> Any:
        entry = self.entries[self.prefix + "data.pkl"]
        where = f"{self.where}: data.pkl"
        return pickle_data.load(self._read(entry, pickle_data.MAX_PICKLE_BYTES), where)

    def tensor(self, view: View, name: str) -> Tensor:
        where = f"{self.where}: tensor '{short(name)}'"
        dtype, storage = view.dtype, view.storage
        if dtype not in dtypes.NUMPY:
            raise ConvertError(f"{where} has the type {short(dtype)}; known are {', '.join(dtypes.NUMPY)}")
        shape = check_shape(where, view.shape)
        entry = self.entries.get(f"{self.prefix}data/{storage.key}")
        if entry is None:
            raise ConvertError(f"{where} is in storage '{short(storage.key)}', which the file does not have")
        itemsize = dtypes.NUMPY[dtype].itemsize
        if len(view.stride) != len(shape) or any(stride < 0 for stride in view.stride) or view.offset < 0:
            raise ConvertError(f"{where} has the strides {list(view.stride)!r:.100} at {view.offset} for the shape {list(shape)}")
        last = view.offset + sum((size - 1) * stride for size, stride in zip(shape, view.stride))
        if 0 not in shape and (last + 1) * itemsize > entry.size:
            raise ConvertError(
                f"{where} needs element {last} of storage '{short(storage.key)}', which has {entry.size // itemsize}"
            )
        place = entry.offset + view.offset * itemsize
        contiguous, expected = True, 1
        for size, stride in zip(reversed(shape), reversed(view.stride)):
            contiguous &= stride == expected or size == 1
            expected *= max(size, 1)
        if contiguous or 0 in shape:
            return FileTensor(self.file, where, dtype, shape, place)
        span = last - view.offset + 1
        elements = 1
        for size in shape:
            elements *= size
        if elements > span:
            raise ConvertError(f"{where} has {elements} elements over only {span} stored ones (an expanded view)")

        def gather() -> np.ndarray:
            flat = np.frombuffer(self.file.read(place, span * itemsize, where), dtypes.NUMPY[dtype])
            strides = [stride * itemsize for stride in view.stride]
            return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, strides))

        return Computed(where, dtype, shape, gather)

    def tensors(self, state: Any, what: str = "the state dict") -> Dict[str, Tensor]:
        if not isinstance(state, dict):
            raise self._fail(f"{what} is not a dictionary")
        result: Dict[str, Tensor] = {}
        for name, view in state.items():
            if isinstance(name, str) and isinstance(view, View):
                result[name] = self.tensor(view, name)
        return result
