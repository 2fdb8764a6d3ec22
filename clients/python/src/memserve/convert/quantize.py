"""Rows of a value table in 8 or 4 bits, with one symmetric scale per row, computed from the whole row.

int8: scale = max|row| / 127, q = x / scale rounded (ties to even), stored as I8
int4: scale = max|row| / 7, q in [-7, 7], stored as q + 8: the low nibble is the even column, the high nibble the odd one
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

import numpy as np

from memserve.convert import dtypes
from memserve.convert.errors import ConvertError

LEVELS = {"int8": 127, "int4": 7}
STORED = {"int8": "I8", "int4": "U8"}
BLOCK_ELEMENTS = 1 << 17  # of float32: half a MiB, so that the passes over a block stay in the cache


def stored_width(kind: str, width: int) -> int:
    return width if kind == "int8" else (width + 1) // 2


@dataclass
class Error:
    """How far rows are from what is stored for them."""

    squared: float = 0.0
    total: float = 0.0
    largest: float = 0.0
    reach: float = 0.0  # the largest magnitude

    def add(self, other: "Error") -> None:
        self.squared += other.squared
        self.total += other.total
        self.largest = max(self.largest, other.largest)
        self.reach = max(self.reach, other.reach)

    @property
    def relative_rms(self) -> float:
        return (self.squared / self.total) ** 0.5 if self.total > 0 else 0.0


def _block(x: np.ndarray, kind: str, out: np.ndarray, scales: np.ndarray, error: Error) -> bool:
    """False where a value is not finite. Overwrites nothing but `out` and `scales`."""
    levels = LEVELS[kind]
    reach = np.maximum(x.max(axis=1), -x.min(axis=1))
    if not np.isfinite(reach).all():
        return False
    np.divide(reach, np.float32(levels), out=scales)
    divisor = np.where(scales > 0, scales, np.float32(1))[:, None]
    q = x / divisor
    np.rint(q, out=q)
    if scales.size and float(scales.min()) < 1e-36:  # subnormal scales are coarse
        np.clip(q, -levels, levels, out=q)
        q[scales == 0] = 0
    if kind == "int8":
        out[...] = q
    else:
        codes = q.astype(np.int8)
        codes += 8
        codes = codes.view(np.uint8)
        even, odd = codes[:, 0::2], codes[:, 1::2]
        np.left_shift(odd, 4, out=out[:, : odd.shape[1]])
        if odd.shape[1] < even.shape[1]:
            out[:, -1] = 8 << 4
        out |= even
    q *= scales[:, None]
    q -= x
    error.add(Error(_squares(q), _squares(x), float(max(q.max(), -q.min())), float(reach.max())))
    return True


def _squares(x: np.ndarray) -> float:
    flat = x.reshape(-1)
    with np.errstate(over="ignore"):
        total = float(np.dot(flat, flat))
    if not np.isfinite(total):  # beyond what float32 can sum
        flat = flat.astype(np.float64)
        total = float(np.dot(flat, flat))
    return total


def rows(stored: np.ndarray, dtype: str, kind: str, where: str, first_row: int) -> Tuple[np.ndarray, np.ndarray, Error]:
    """`stored` [rows, width] of type `dtype` -> codes, scales [rows], what was lost."""
    num_rows, width = stored.shape
    codes = np.empty((num_rows, stored_width(kind, width)), dtypes.NUMPY[STORED[kind]])
    scales = np.empty(num_rows, np.float32)
    error = Error()
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        x = dtypes.to_f32(stored[begin:end], dtype)
        if width and not _block(x, kind, codes[begin:end], scales[begin:end], error):
            row = begin + int(np.argmin(np.isfinite(x).all(axis=1)))
            raise ConvertError(f"{where}: row {first_row + row} has a value that is NaN or infinite; {kind} cannot hold it")
    return codes, scales, error


def unpack(codes: np.ndarray, width: int) -> np.ndarray:
    """Integers of either form: I8 [rows, width], or U8 [rows, (width + 1) / 2] -> [rows, width] as float32."""
    if codes.dtype == np.int8:
        return codes.astype(np.float32)
    values = np.empty((codes.shape[0], 2 * codes.shape[1]), np.float32)
    values[:, 0::2] = codes & 15
    values[:, 1::2] = codes >> 4
    values -= 8
    return values[:, :width]


def dequantize(codes: np.ndarray, scales: np.ndarray, width: int) -> np.ndarray:
    return unpack(codes, width) * scales.reshape(-1, 1)
