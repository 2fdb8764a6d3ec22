"""Writes a model as a folder of safetensors shards, a few rows at a time and in several threads.

A shard is written beside its final name, synced, read back and compared, and only then renamed; what is finished is in a state file
with its SHA-256, so that a conversion that was interrupted goes on with the first shard that is not. config.json comes last: a folder
without it is not a checkpoint yet.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import json
import os
import shutil
import struct
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np

from memserve.convert import dtypes, quantize
from memserve.convert.errors import ConvertError, short
from memserve.convert.files import Source
from memserve.convert.model import Model
from memserve.convert.progress import Progress, size_text
from memserve.convert.readers import safetensors
from memserve.convert.tensor import Tensor

OWN = ".memserve_convert"
STATE = OWN + ".json"
LOCK = OWN + ".lock"
PROVENANCE = "memserve_conversion.json"
FORM = 1  # of what is written: a conversion begun by another form is not continued
CHUNK_BYTES = 8 << 20  # of a source, per thread


@dataclass
class Options:
    dtype: str = "keep"
    table_dtype: str = "keep"
    max_shard_bytes: int = 4 << 30
    threads: int = 0  # 0: one per core, four at most
    quiet: bool = False


@dataclass
class Output:
    """A tensor of the folder. A quantised table has a second one, for its scales."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    source: Tensor
    kind: str = "copy"  # "copy", "cast", "int8", "int4"
    scale: Optional["Output"] = None
    offset: int = 0  # in the shard's file

    @property
    def nbytes(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * dtypes.NUMPY[self.dtype].itemsize

    @property
    def group(self) -> List["Output"]:
        return [self] if self.scale is None else [self, self.scale]


@dataclass
class Shard:
    name: str
    outputs: List[Output] = field(default_factory=list)

    @property
    def tensors(self) -> List[Output]:
        """In the order of the file: large elements first, so that every tensor is aligned."""
        every = [tensor for output in self.outputs for tensor in output.group]
        return sorted(every, key=lambda tensor: -dtypes.NUMPY[tensor.dtype].itemsize)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass
class Report:
    """What was seen while writing, per tensor."""

    errors: Dict[str, quantize.Error] = field(default_factory=dict)
    nonfinite: Dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    nbytes: int = 0


def plan(model: Model, options: Options) -> List[Output]:
    outputs = []
    for name, tensor in model.tensors.items():
        target = options.table_dtype if name in model.tables else options.dtype
        if name in model.exact:
            target = "keep"
        if target in quantize.LEVELS:
            if len(tensor.shape) != 2:
                raise ConvertError(f"{tensor.where} has the shape {list(tensor.shape)}; a value table has two axes")
            shape = (tensor.shape[0], quantize.stored_width(target, tensor.shape[1]))
            stem = name[: -len(".weight")]
            scale = Output(f"{stem}.scale", "F32", (tensor.shape[0],), tensor)
            outputs.append(Output(name, quantize.STORED[target], shape, tensor, target, scale))
            continue
        dtype = tensor.dtype
        if dtype in dtypes.FLOATS:
            dtype = dtypes.FLAGS.get(target, "F32" if dtype == "F64" else dtype)
        outputs.append(Output(name, dtype, tensor.shape, tensor, "copy" if dtype == tensor.dtype else "cast"))
    return outputs


def shards(outputs: List[Output], max_shard_bytes: int) -> List[Shard]:
    groups: List[List[Output]] = []
    filled = 0
    for output in outputs:
        size = sum(tensor.nbytes for tensor in output.group)
        if not groups or filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += size
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [Shard(f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors", group) for index, group in enumerate(groups)]


def write_atomically(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_of(path: Path, stop: Optional[threading.Event] = None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(8 << 20), b""):
            digest.update(part)
            if stop is not None and stop.is_set():
                raise ConvertError("interrupted")
    return digest.hexdigest()


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


class Writer:
    def __init__(self, model: Model, dest: Path, options: Options, progress: Optional[Progress] = None):
        self._model = model
        self._dest = dest
        self._options = options
        self._outputs = plan(model, options)
        self._shards = shards(self._outputs, options.max_shard_bytes)
        self._progress = progress or Progress(sum(output.source.nbytes for output in self._outputs), quiet=options.quiet)
        self._report = Report()
        self._lock = threading.Lock()
        self._threads = options.threads or min(4, os.cpu_count() or 1)
        self._stop = threading.Event()

    # ---- the folder ----

    def write(self) -> Report:
        key = self._key()
        lock = self._claim()
        try:
            state = self._resume(key)
            if state.get("complete"):
                self._verify_finished(state)
                self._progress.line(f"{self._dest} already holds this conversion; its shards were checked")
                return self._report
            self._check_space(state)
            if self._model.check is not None:
                self._model.check()
            hashes = _SourceHashes(self._model.source, self._stop)
            try:
                for shard in self._shards:
                    if not self._finished(shard, state):
                        self._write_shard(shard, state)
                for _, file in self._model.source.files:
                    file.check_unchanged()
                sources = hashes.result()
            finally:
                self._stop.set()
                hashes.join()
            self._finish(key, state, sources)
            return self._report
        finally:
            self._progress.close()
            if not (self._dest / STATE).exists():
                (self._dest / LOCK).unlink()
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _key(self) -> str:
        """Equal for two runs that would write the same."""
        about = {
            "form": FORM,
            "family": self._model.family,
            "sources": [(name, file.size, file.mtime_ns) for name, file in self._model.source.files],
            "options": [self._options.dtype, self._options.table_dtype, self._options.max_shard_bytes],
            "config": self._config(),
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self._model.files.items())},
            "tensors": [(t.name, t.dtype, t.shape) for output in self._outputs for t in output.group],
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def _claim(self) -> int:
        """Makes the folder, and keeps others out of it while this process runs."""
        try:
            if self._dest.exists():
                if not self._dest.is_dir():
                    raise ConvertError(f"{self._dest} is not a folder")
                names = {entry.name for entry in self._dest.iterdir()}
                other = sorted(name for name in names if not name.startswith(OWN))
                if other and not names & {STATE, PROVENANCE}:
                    raise ConvertError(f"{self._dest} holds something else ({short(other[0])}); give an empty or a new folder")
            self._dest.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._dest / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConvertError(f"{self._dest}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ConvertError(f"{self._dest}: another memserve-convert is writing this folder") from None
        return lock

    def _resume(self, key: str) -> Dict[str, Any]:
        for name in (STATE, PROVENANCE):
            path = self._dest / name
            if not path.exists():
                continue
            try:
                state = json.loads(path.read_bytes())
            except (ValueError, OSError):
                raise ConvertError(f"{path} cannot be read; remove {self._dest} and begin again") from None
            if not isinstance(state, dict) or state.get("key") != key:
                raise ConvertError(
                    f"{self._dest} holds another conversion (other source or options); remove it or give another folder"
                )
            state["complete"] = name == PROVENANCE
            return state
        state = {"key": key, "shards": {}}
        write_atomically(self._dest / STATE, _json(state))
        return state

    def _verify_finished(self, state: Dict[str, Any]) -> None:
        for shard in self._shards:
            if not self._finished(shard, state):
                raise ConvertError(
                    f"{self._dest / shard.name} is not what was written there; remove {self._dest} and convert again"
                )

    def _finished(self, shard: Shard, state: Dict[str, Any]) -> bool:
        entry = state["shards"].get(shard.name)
        path = self._dest / shard.name
        if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        if sha256_of(path) != entry["sha256"]:
            return False
        for name, values in entry["row_errors"].items():
            self._report.errors[name] = quantize.Error(*values)
        self._report.nonfinite.update(entry["nonfinite"])
        for output in shard.outputs:
            self._progress.add(output.source.nbytes, "finished before")
        self._progress.line(f"{shard.name}: finished before, checked")
        return True

    def _check_space(self, state: Dict[str, Any]) -> None:
        needed = sum(shard.nbytes for shard in self._shards if not (self._dest / shard.name).exists()) + (1 << 20)
        free = shutil.disk_usage(self._dest).free
        for leftover in self._dest.glob("*.part"):
            leftover.unlink()
        if needed > free:
            raise ConvertError(f"{self._dest} needs {size_text(needed)}; {size_text(free)} are free there")

    def _finish(self, key: str, state: Dict[str, Any], sources: List[Dict[str, Any]]) -> None:
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(shard.nbytes for shard in self._shards)},
                "weight_map": {t.name: shard.name for shard in self._shards for t in shard.tensors},
            }
            write_atomically(self._dest / "model.safetensors.index.json", _json(index))
        for name, data in self._model.files.items():
            write_atomically(self._dest / name, data)
        provenance = {
            "key": key,
            "converter": "memserve-convert",
            "family": self._model.family,
            "dtype": self._options.dtype,
            "table_dtype": self._options.table_dtype,
            "sources": sources,
            "shards": state["shards"],
        }
        write_atomically(self._dest / "config.json", _json(self._config()))
        write_atomically(self._dest / PROVENANCE, _json(provenance))
        (self._dest / STATE).unlink()

    def _config(self) -> Dict[str, Any]:
        config = dict(self._model.config)
        if self._options.dtype != "keep":
            for key in self._model.dtype_keys:
                config[key] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[self._options.dtype]
        return config

    # ---- one shard ----

    def _write_shard(self, shard: Shard, state: Dict[str, Any]) -> None:
        header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in shard.tensors:
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
            tensor.offset = at
            at += tensor.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % 64)
        head = struct.pack("<Q", len(text)) + text
        for tensor in shard.tensors:
            tensor.offset += len(head)

        part = self._dest / (shard.name + ".part")
        try:
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            raise ConvertError(f"{part}: {error.strerror}") from None
        try:
            _pwrite(fd, head, 0, part)
            work = _Work(fd, part, [(0, len(head), zlib.crc32(head))])
            self._each(lambda item: self._write_rows(work, *item), _spans(shard.outputs, work))
            os.fsync(fd)
            digest = self._read_back(fd, part, work.pieces, len(head) + at)
        finally:
            os.close(fd)
        self._check_header(part, shard)
        os.replace(part, self._dest / shard.name)
        sync_folder(self._dest)
        errors = work.errors()
        self._report.errors.update(errors)
        self._report.nonfinite.update(sorted(work.nonfinite.items()))
        state["shards"][shard.name] = {
            "bytes": len(head) + at,
            "sha256": digest,
            "row_errors": {name: [e.squared, e.total, e.largest, e.reach] for name, e in errors.items()},
            "nonfinite": dict(sorted(work.nonfinite.items())),
        }
        write_atomically(self._dest / STATE, _json({name: state[name] for name in ("key", "shards")}))
        self._progress.line(f"{shard.name}: {len(shard.tensors)} tensors, {size_text(len(head) + at)}, read back and equal")

    def _write_rows(self, work: "_Work", output: Output, begin: int, end: int) -> None:
        if self._stop.is_set():
            return
        source = output.source
        rows = source.rows(begin, end)
        bad = 0
        written: List[Tuple[Output, np.ndarray]] = []
        if output.kind in quantize.LEVELS:
            codes, scales, error = quantize.rows(rows, source.dtype, output.kind, source.where, begin)
            work.lost[output.name, begin] = error
            assert output.scale is not None
            written = [(output, codes), (output.scale, scales)]
        else:
            if source.dtype in dtypes.FLOATS:
                bad = dtypes.nonfinite(rows, source.dtype)
            if output.kind == "cast":
                rows = dtypes.from_f32(dtypes.to_f32(rows, source.dtype), output.dtype)
                if dtypes.nonfinite(rows, output.dtype) > bad:
                    raise ConvertError(f"{source.where} has values beyond the range of {output.dtype}")
            written = [(output, rows)]
        done = []
        for target, array in written:
            data = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else memoryview(b"")
            place = target.offset + begin * (target.nbytes // max(1, source.num_rows))
            _pwrite(work.fd, data, place, work.path)
            done.append((place, len(data), zlib.crc32(data)))
        with self._lock:
            work.pieces.extend(done)
            if bad:
                work.nonfinite[output.name] = work.nonfinite.get(output.name, 0) + bad
            work.waiting[output.name] -= 1
            last = work.waiting[output.name] == 0
        if last:
            source.release()
        self._progress.add((end - begin) * (source.nbytes // max(1, source.num_rows)), output.name)

    def _each(self, function, items: Iterator[Any]) -> None:
        """function(item) for all, in threads; no more of them waiting than run."""
        if self._threads == 1:
            for item in items:
                function(item)
            return
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            waiting = set()
            try:
                for item in items:
                    waiting.add(pool.submit(function, item))
                    if len(waiting) > self._threads:
                        done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                        for future in done:
                            future.result()
                for future in concurrent.futures.as_completed(waiting):
                    future.result()
            except BaseException:
                self._stop.set()
                raise

    def _read_back(self, fd: int, path: Path, pieces: List[Tuple[int, int, int]], size: int) -> str:
        """Compares the file with what was written, piece by piece, and returns its SHA-256."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk answers, not the cache
        digest = hashlib.sha256()
        at = 0
        for offset, length, crc in sorted(piece for piece in pieces if piece[1]):
            if self._stop.is_set():
                raise ConvertError("interrupted")
            data = os.pread(fd, length, offset)
            if offset != at or len(data) != length or zlib.crc32(data) != crc:
                raise ConvertError(
                    f"{path}: bytes {offset} to {offset + length} read back differ from what was written; "
                    "the disk or the memory is faulty"
                )
            digest.update(data)
            at += length
        if at != size or os.fstat(fd).st_size != size:
            raise ConvertError(f"{path} has {os.fstat(fd).st_size} bytes after writing; it should have {size}")
        return digest.hexdigest()

    def _check_header(self, part: Path, shard: Shard) -> None:
        """The file as a reader sees it."""
        source = Source(part.parent)
        file = source.open(part.name)
        try:
            found = safetensors.read(file)
        finally:
            file.close()
        expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
        if {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} != expected:
            raise ConvertError(f"{part}: the header read back differs from what was written")


class _SourceHashes:
    """SHA-256 of the source files, computed beside the conversion."""

    def __init__(self, source: Source, stop: threading.Event):
        self._source = source
        self._stop = stop
        self._result: List[Dict[str, Any]] = []
        self._failure: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for name, file in self._source.files:
                self._result.append({"file": name, "bytes": file.size, "sha256": sha256_of(file.path, self._stop)})
        except BaseException as error:
            self._failure = error

    def result(self) -> List[Dict[str, Any]]:
        while self._thread.is_alive():
            self._thread.join(0.2)  # so that Ctrl-C is heard
        if isinstance(self._failure, OSError):
            raise ConvertError(f"{self._failure.filename}: {self._failure.strerror}")
        if self._failure is not None:
            raise self._failure
        return self._result

    def join(self) -> None:
        self._thread.join()


@dataclass
class _Work:
    """What the threads that fill a shard share."""

    fd: int
    path: Path
    pieces: List[Tuple[int, int, int]]  # offset, length, CRC-32
    lost: Dict[Tuple[str, int], quantize.Error] = field(default_factory=dict)  # by tensor and first row
    nonfinite: Dict[str, int] = field(default_factory=dict)
    waiting: Dict[str, int] = field(default_factory=dict)  # spans of a tensor that are not written yet

    def errors(self) -> Dict[str, quantize.Error]:
        """In the order of the rows, so that the sums come out the same every time."""
        total: Dict[str, quantize.Error] = {}
        for name, begin in sorted(self.lost):
            total.setdefault(name, quantize.Error()).add(self.lost[name, begin])
        return total


def _spans(outputs: List[Output], work: _Work) -> Iterator[Tuple[Output, int, int]]:
    for output in outputs:
        rows = output.source.num_rows
        step = max(1, CHUNK_BYTES // max(1, output.source.nbytes // max(1, rows)))
        work.waiting[output.name] = -(-rows // step)
        for begin in range(0, rows, step):
            yield output, begin, min(begin + step, rows)


def _pwrite(fd: int, data: Any, offset: int, path: Path) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        try:
            done += os.pwrite(fd, view[done:], offset + done)
        except OSError as error:
            raise ConvertError(f"{path}: {error.strerror}") from None
