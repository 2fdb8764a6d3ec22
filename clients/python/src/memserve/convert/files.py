"""Opens files of a source folder, and only of that folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

from memserve.convert.errors import ConvertError, short

MAX_JSON_BYTES = 128 << 20


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. A name that leads out of the folder is refused, and so is a symlink, except for the layout of
    the Hugging Face hub's cache (snapshots/REVISION/FILE -> ../../blobs/HASH)."""
    relative = Path(name)
    if not name or "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise ConvertError(f"{folder}: the file name '{short(name)}' leads out of the folder")
    path = folder / relative
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ConvertError(f"{path}: {error}") from None
    if root != real and root not in real.parents:
        blobs = root.parent.parent / "blobs"
        hub = root.parent.name == "snapshots" and real.parent == blobs and re.fullmatch("[0-9a-f]{40,64}", real.name)
        if not hub:
            raise ConvertError(f"{path} is a link to {real}, which lies outside the folder")
    return path


class SourceFile:
    """A file that is read at given places. Notices when it is shorter than it was, or changed."""

    def __init__(self, path: Path):
        self.path = path
        try:
            if path.exists() and not path.is_file():
                raise ConvertError(f"{path} is not a regular file")
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ConvertError(f"{path}: {error.strerror}") from None
        self._stat = self._identity()
        self.size = self._stat[0]

    def _identity(self) -> Tuple[int, int, int]:
        stat = os.fstat(self._fd)
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def check_unchanged(self) -> None:
        if self._identity() != self._stat:
            raise ConvertError(f"{self.path} changed while it was read")

    @property
    def mtime_ns(self) -> int:
        return self._stat[1]

    def read(self, offset: int, size: int, what: str = "") -> bytearray:
        """Exactly `size` bytes, into memory that may be written to."""
        named = f"{self.path}: {what}" if what else str(self.path)
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ConvertError(f"{named} needs bytes {offset} to {offset + size}; the file has {self.size}")
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            try:
                count = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise ConvertError(f"{named}: {error.strerror}") from None
            if count == 0:
                raise ConvertError(f"{named} ends at byte {offset + done}; it had {self.size} when it was opened")
            done += count
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Source:
    """A folder (or one file in it) with everything that was opened, for the provenance."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: Dict[str, SourceFile] = {}

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def open(self, name: str) -> SourceFile:
        if name not in self._files:
            self._files[name] = SourceFile(inside(self.folder, name))
        return self._files[name]

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        file = self.open(name)
        if file.size > limit:
            raise ConvertError(f"{file.path} has {file.size} bytes; at most {limit} make sense")
        return bytes(file.read(0, file.size))

    def json(self, name: str) -> Dict[str, Any]:
        return parse_json(self.read(name), str(self.folder / name))

    @property
    def files(self) -> List[Tuple[str, SourceFile]]:
        return sorted(self._files.items())

    def names(self) -> List[str]:
        try:
            return sorted(entry.name for entry in self.folder.iterdir())
        except OSError as error:
            raise ConvertError(f"{self.folder}: {error.strerror}") from None


def parse_json(data: bytes, where: str) -> Dict[str, Any]:
    def unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen = set()
            for key, _ in pairs:
                if key in seen:
                    raise ConvertError(f"{where}: '{short(key)}' appears twice")
                seen.add(key)
        return result

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ConvertError(f"{where} is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise ConvertError(f"{where} is not JSON: {short(str(error))}") from None
    if not isinstance(document, dict):
        raise ConvertError(f"{where} is not a JSON object")
    return document
