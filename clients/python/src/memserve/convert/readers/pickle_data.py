"""Reads pickles as data. This is not Python's unpickler: it imports nothing and calls nothing that a pickle names. A pickle may name
only what is listed in ALLOWED, and each of those becomes a plain value here. Anything else is refused."""

from __future__ import annotations

import struct
from typing import Any, Callable, Dict, List, Optional, Tuple

from memserve.convert.errors import ConvertError, short

MAX_PICKLE_BYTES = 256 << 20
MAX_OPERATIONS = 20_000_000
MAX_INT_BYTES = 64


class Name:
    """A class or function that the pickle names; never imported."""

    __slots__ = ("module", "name", "build")

    def __init__(self, module: str, name: str, build: Callable[..., Any]):
        self.module = module
        self.name = name
        self.build = build

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Record:
    """An instance of a listed class: what it was made from, and its state."""

    __slots__ = ("kind", "args", "state")

    def __init__(self, kind: str, args: Tuple[Any, ...] = ()):
        self.kind = kind
        self.args = args
        self.state: Any = None

    def get(self, key: str, default: Any = None) -> Any:
        return self.state.get(key, default) if isinstance(self.state, dict) else default


class Storage:
    """torch's storage, by its key in the file."""

    __slots__ = ("dtype", "key", "elements")

    def __init__(self, dtype: str, key: str, elements: int):
        self.dtype = dtype  # "" for an untyped one
        self.key = key
        self.elements = elements


class View:
    """torch's tensor: a strided view of a storage."""

    __slots__ = ("storage", "offset", "shape", "stride", "dtype")

    def __init__(self, storage: Storage, offset: int, shape: Tuple[int, ...], stride: Tuple[int, ...], dtype: str):
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.stride = stride
        self.dtype = dtype


class Fault(Exception):
    """What is wrong, before the file's name is put in front."""


STORAGE_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "UntypedStorage": "",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Dtype:
    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


def _ints(value: Any) -> Tuple[int, ...]:
    if isinstance(value, Record) and value.kind == "torch.Size" and value.args:
        value = value.args[0]
    if not isinstance(value, (tuple, list)) or not all(type(v) is int for v in value):
        raise Fault("a tensor's sizes are not integers")
    return tuple(value)


def _view(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Optional[str] = None) -> View:
    if not isinstance(storage, Storage):
        raise Fault("a tensor is not a view of a storage")
    if type(offset) is not int:
        raise Fault("a tensor's place in its storage is not an integer")
    return View(storage, offset, _ints(shape), _ints(stride), dtype or storage.dtype)


def _rebuild_tensor_v2(storage, offset, shape, stride, *_rest):
    return _view(storage, offset, shape, stride)


def _rebuild_tensor_v3(storage, offset, shape, stride, _requires_grad, _hooks, dtype, *_rest):
    if not isinstance(dtype, Dtype):
        raise Fault("a tensor has no type")
    return _view(storage, offset, shape, stride, DTYPES.get(dtype.name, dtype.name))


def _rebuild_parameter(data, *_rest):
    return data


def _rebuild_from_type(function, _kind, args, *_rest):
    if not isinstance(function, Name) or not function.name.startswith("_rebuild_") or not isinstance(args, tuple):
        raise Fault("a tensor is made in an unknown way")
    return function.build(*args)


def _ordered_dict(*args):
    if not args:
        return {}
    pairs = args[0]
    if isinstance(pairs, dict):
        return dict(pairs)
    result: Dict[Any, Any] = {}
    for pair in pairs if isinstance(pairs, (list, tuple)) else [None]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Fault("an OrderedDict is not made of pairs")
        result[_key(pair[0])] = pair[1]
    return result


def _sequence(kind):
    def build(*args):
        if args and not isinstance(args[0], (list, tuple, dict, set, frozenset)):
            raise Fault(f"a {kind.__name__} is not made of a list")
        return kind(args[0]) if args else kind()

    return build


def _opaque(kind: str) -> Callable[..., Record]:
    return lambda *args: Record(kind, args)


def _listed() -> Dict[Tuple[str, str], Callable[..., Any]]:
    allowed: Dict[Tuple[str, str], Callable[..., Any]] = {
        ("torch._utils", "_rebuild_tensor"): _rebuild_tensor_v2,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
        ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
        ("collections", "OrderedDict"): _ordered_dict,
        ("collections", "defaultdict"): lambda *args: _ordered_dict(*args[1:]),
    }
    # Read as a name and its arguments, and otherwise ignored: what else is found in training checkpoints.
    for module, names in {
        "torch": ("Size", "device", "Tensor"),
        "torch.nn.parameter": ("Buffer",),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
        "argparse": ("Namespace",),
        "types": ("SimpleNamespace",),
        "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        "numpy": ("dtype", "ndarray"),
        "numpy.core.multiarray": ("scalar", "_reconstruct"),
        "numpy._core.multiarray": ("scalar", "_reconstruct"),
        "_codecs": ("encode",),
    }.items():  # fmt: skip
        for name in names:
            allowed[module, name] = _opaque(f"{module}.{name}")
    for kind in (list, tuple, set, frozenset, dict, int, float, bool, str):
        for module in ("builtins", "__builtin__"):
            build = _sequence(kind) if kind in (list, tuple, set, frozenset) else _opaque(f"builtins.{kind.__name__}")
            allowed[module, kind.__name__] = build
    return allowed


ALLOWED = _listed()


def _find(module: str, name: str) -> Any:
    if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
        return Name(module, name, _opaque("torch." + name))
    if module == "torch" and (name in DTYPES or name.startswith(("float8_", "uint", "complex", "bits", "qint", "quint"))):
        return Dtype(name)
    build = ALLOWED.get((module, name))
    if build is None:
        raise Fault(f"it names {short(module)}.{short(name)}; only what describes tensors is read, and nothing is ever run")
    return Name(module, name, build)


def _key(key: Any) -> Any:
    """Keys are scalars or one level of them: hashing a deep tuple would recurse without limit."""
    for part in key if type(key) is tuple else (key,):
        if not (part is None or type(part) in (str, bytes, int, float, bool) or isinstance(part, (Record, Dtype, Name))):
            raise Fault("a dictionary has a key that is not a plain value")
    return key


class _Mark:
    pass


_MARK = _Mark()


class _Machine:
    def __init__(self, data: bytes):
        self.data = data
        self.at = 0
        self.stack: List[Any] = []
        self.memo: Dict[int, Any] = {}

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.data):
            raise Fault(f"it ends at byte {len(self.data)}, in the middle of a value")
        part = self.data[self.at : self.at + size]
        self.at += size
        return part

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise Fault("it has a line without an end")
        text = self.data[self.at : end]
        self.at = end + 1
        return text.decode("utf-8")

    def text(self, form: str) -> str:
        return self.take(self.number(form)).decode("utf-8", "surrogatepass")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise Fault("a value is missing")
        return self.stack.pop()

    def since_mark(self) -> List[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise Fault("a mark is missing")

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise Fault(f"a {kind.__name__} is missing")
        return self.stack[-1]

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise Fault("a call has no arguments")
        if not isinstance(function, Name):
            raise Fault("it calls something that is not a listed name")
        try:
            return function.build(*args)
        except TypeError:
            raise Fault(f"{function} is called with {len(args)} arguments that do not fit") from None

    def update(self, target: Any, values: List[Any]) -> None:
        if len(values) % 2 or not isinstance(target, (dict, Record)):
            raise Fault("a dictionary is missing")
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2]):
                target[_key(key)] = value

    def extend(self, target: Any, values: List[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(_key(value) for value in values)
        elif not isinstance(target, Record):
            raise Fault("a list is missing")

    def persistent(self, pid: Any) -> Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise Fault("it refers to something outside that is no storage")
        kind, key, elements = pid[1], pid[2], pid[4]
        if not isinstance(kind, Name) or kind.name not in STORAGE_DTYPES:
            raise Fault("a storage has an unknown type")
        if not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise Fault("a storage has no key or size")
        return Storage(STORAGE_DTYPES[kind.name], key, elements)

    def run(self) -> Any:
        push = self.stack.append
        for _ in range(MAX_OPERATIONS):
            code = self.take(1)
            if code == b".":
                result = self.pop()
                return result
            elif code == b"\x80":
                if not 2 <= self.number("<B") <= 5:
                    raise Fault("its pickle protocol is not 2 to 5")
            elif code == b"\x95":
                self.take(8)
            elif code == b"(":
                push(_MARK)
            elif code == b"0":
                self.pop()
            elif code == b"1":
                self.since_mark()
            elif code == b"2":
                push(self.top(object))
            elif code == b"N":
                push(None)
            elif code == b"\x88":
                push(True)
            elif code == b"\x89":
                push(False)
            elif code == b"K":
                push(self.number("<B"))
            elif code == b"M":
                push(self.number("<H"))
            elif code == b"J":
                push(self.number("<i"))
            elif code in (b"\x8a", b"\x8b"):
                size = self.number("<B" if code == b"\x8a" else "<I")
                if size > MAX_INT_BYTES:
                    raise Fault(f"it has an integer of {size} bytes")
                push(int.from_bytes(self.take(size), "little", signed=True))
            elif code == b"I":
                line = self.line()
                push({"00": False, "01": True}.get(line, None) if line in ("00", "01") else self.integer(line))
            elif code == b"L":
                push(self.integer(self.line().rstrip("L")))
            elif code == b"G":
                push(struct.unpack(">d", self.take(8))[0])
            elif code == b"F":
                push(float(self.line()))
            elif code == b"\x8c":
                push(self.text("<B"))
            elif code == b"X":
                push(self.text("<I"))
            elif code == b"\x8d":
                push(self.text("<Q"))
            elif code == b"U":
                push(self.take(self.number("<B")).decode("latin-1"))
            elif code == b"T":
                push(self.take(self.number("<I")).decode("latin-1"))
            elif code == b"C":
                push(self.take(self.number("<B")))
            elif code == b"B":
                push(self.take(self.number("<I")))
            elif code == b"\x8e":
                push(self.take(self.number("<Q")))
            elif code == b"]":
                push([])
            elif code == b"}":
                push({})
            elif code == b")":
                push(())
            elif code == b"\x8f":
                push(set())
            elif code == b"l":
                values = self.since_mark()
                push(values)
            elif code == b"t":
                values = self.since_mark()
                push(tuple(values))
            elif code == b"d":
                values = self.since_mark()
                push({})
                self.update(self.stack[-1], values)
            elif code == b"\x91":
                values = self.since_mark()
                push(frozenset(_key(value) for value in values))
            elif code in (b"\x85", b"\x86", b"\x87"):
                values = [self.pop() for _ in range(code[0] - 0x84)]
                push(tuple(reversed(values)))
            elif code == b"a":
                value = self.pop()
                self.extend(self.top(object), [value])
            elif code in (b"e", b"\x90"):
                values = self.since_mark()
                self.extend(self.top(object), values)
            elif code == b"s":
                value, key = self.pop(), self.pop()
                self.update(self.top(object), [key, value])
            elif code == b"u":
                values = self.since_mark()
                self.update(self.top(object), values)
            elif code == b"c":
                module, name = self.line(), self.line()
                push(_find(module, name))
            elif code == b"\x93":
                name, module = self.pop(), self.pop()
                if not isinstance(module, str) or not isinstance(name, str):
                    raise Fault("a name is not text")
                push(_find(module, name))
            elif code == b"R":
                args, function = self.pop(), self.pop()
                push(self.call(function, args))
            elif code == b"\x81":
                args, function = self.pop(), self.pop()
                push(self.call(function, args))
            elif code == b"b":
                state = self.pop()
                target = self.top(object)
                if isinstance(target, Record):
                    target.state = state
                elif not isinstance(target, (dict, View)):  # an OrderedDict's or a tensor's attributes do not matter
                    raise Fault("it sets the state of a plain value")
            elif code == b"q":
                self.memo[self.number("<B")] = self.top(object)
            elif code == b"r":
                self.memo[self.number("<I")] = self.top(object)
            elif code == b"p":
                self.memo[self.integer(self.line())] = self.top(object)
            elif code == b"\x94":
                self.memo[len(self.memo)] = self.top(object)
            elif code in (b"h", b"j", b"g"):
                index = self.number("<B") if code == b"h" else self.number("<I") if code == b"j" else self.integer(self.line())
                if index not in self.memo:
                    raise Fault(f"it refers to a value {index} that it does not have")
                push(self.memo[index])
            elif code == b"Q":
                push(self.persistent(self.pop()))
            else:
                raise Fault(f"its byte {self.at - 1} is {code!r}, which no description of tensors needs")
        raise Fault(f"it has more than {MAX_OPERATIONS} operations")

    @staticmethod
    def integer(line: str) -> int:
        if len(line) > MAX_INT_BYTES:
            raise Fault("it has an integer that is too long")
        return int(line)


def load(data: bytes, where: str) -> Any:
    """`where` names the file in messages."""
    if len(data) > MAX_PICKLE_BYTES:
        raise ConvertError(f"{where} has {len(data)} bytes; at most {MAX_PICKLE_BYTES} make sense")
    try:
        return _Machine(data).run()
    except Fault as fault:
        raise ConvertError(f"{where}: {fault}") from None
    except (ValueError, struct.error, OverflowError, RecursionError) as error:
        raise ConvertError(f"{where} is not a pickle: {short(str(error))}") from None
