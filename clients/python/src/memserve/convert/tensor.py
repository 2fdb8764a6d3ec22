"""Tensors that are read when they are written, a few rows at a time, so that no checkpoint is ever in memory as a whole."""

from __future__ import annotations

import threading
from typing import Callable, Optional, Sequence, Tuple

import numpy as np

from memserve.convert import dtypes
from memserve.convert.errors import ConvertError

Shape = Tuple[int, ...]

MAX_AXES = 8
MAX_ELEMENTS = 1 << 46


def check_shape(where: str, shape: Sequence[object]) -> Shape:
    """`where` names file and tensor."""
    if len(shape) > MAX_AXES:
        raise ConvertError(f"{where} has {len(shape)} axes; at most {MAX_AXES} make sense")
    elements = 1
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_ELEMENTS:
            raise ConvertError(f"{where} has the shape {list(shape)!r:.100}; sizes are integers from 0 to {MAX_ELEMENTS}")
        elements *= max(1, size)
    if elements > MAX_ELEMENTS:
        raise ConvertError(f"{where} has the shape {list(shape)!r:.100}: more than {MAX_ELEMENTS} elements")
    return tuple(shape)  # type: ignore[arg-type]


class Tensor:
    """`where` is for messages. A row is everything under one index of the first axis; a scalar is one row."""

    def __init__(self, where: str, dtype: str, shape: Shape):
        self.where = where
        self.dtype = dtype
        self.shape = shape

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        elements = 1
        for size in self.shape[1:]:
            elements *= size
        return elements

    @property
    def elements(self) -> int:
        return self.num_rows * self.row_elements

    @property
    def nbytes(self) -> int:
        return self.elements * dtypes.NUMPY[self.dtype].itemsize

    def rows(self, begin: int, end: int) -> np.ndarray:
        """[end - begin, row_elements], as stored (bfloat16: its bits)."""
        raise NotImplementedError

    def release(self) -> None:
        """Called when all rows were read."""

    def array(self) -> np.ndarray:
        """The whole tensor as stored. For small ones."""
        return self.rows(0, self.num_rows).reshape(self.shape)

    def f32(self) -> np.ndarray:
        return dtypes.to_f32(self.array(), self.dtype)

    def f64(self) -> np.ndarray:
        return self.f32().astype("f8") if self.dtype != "F64" else self.array()


class Computed(Tensor):
    """Made as a whole by a function, at the first read; freed after the last."""

    def __init__(self, where: str, dtype: str, shape: Shape, function: Callable[[], np.ndarray]):
        super().__init__(where, dtype, shape)
        self._function = function
        self._lock = threading.Lock()
        self._array: Optional[np.ndarray] = None

    def rows(self, begin: int, end: int) -> np.ndarray:
        with self._lock:
            if self._array is None:
                made = np.ascontiguousarray(self._function())
                if made.size != self.elements or made.dtype != dtypes.NUMPY[self.dtype]:
                    raise AssertionError(f"{self.where}: made {made.shape} {made.dtype}, promised {self.shape} {self.dtype}")
                self._array = made.reshape(self.num_rows, self.row_elements)
            return self._array[begin:end]

    def release(self) -> None:
        with self._lock:
            self._array = None


class RowRange(Tensor):
    """Rows [first, first + count) of another tensor."""

    def __init__(self, base: Tensor, first: int, count: int):
        super().__init__(base.where, base.dtype, (count,) + base.shape[1:])
        self._base = base
        self._first = first

    def rows(self, begin: int, end: int) -> np.ndarray:
        return self._base.rows(self._first + begin, self._first + end)


class MappedRows(Tensor):
    """`function` makes rows of this tensor out of the same rows of `bases`."""

    def __init__(self, bases: Sequence[Tensor], dtype: str, shape: Shape, function: Callable[..., np.ndarray]):
        super().__init__(bases[0].where, dtype, shape)
        self._bases = tuple(bases)
        self._function = function

    def rows(self, begin: int, end: int) -> np.ndarray:
        return self._function(*(base.rows(begin, end) for base in self._bases))
