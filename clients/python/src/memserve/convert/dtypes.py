"""Element types by their safetensors names. numpy has no bfloat16: such arrays are held as its 16 bits."""

from __future__ import annotations

import numpy as np

NUMPY = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
FLAGS = {"f32": "F32", "bf16": "BF16", "f16": "F16"}  # as options spell them


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    wide = np.zeros(bits.shape, "<u4")
    wide.view("<u2")[..., 1::2] = bits  # the upper half of a float32
    return wide.view("<f4")


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = rounded.astype("<u2")
    nan = np.isnan(values)
    if nan.any():
        result[nan] = (bits[nan] >> 16) | 0x40
    return result


def to_f32(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return bf16_to_f32(np.ascontiguousarray(array))
    return array.astype("<f4", copy=False)


def from_f32(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return f32_to_bf16(array)
    with np.errstate(over="ignore"):  # what becomes infinite is counted by the caller
        return array.astype(NUMPY[dtype], copy=False)


def nonfinite(array: np.ndarray, dtype: str) -> int:
    """How many elements are NaN or infinite."""
    if dtype == "BF16":
        return int(np.count_nonzero((array & 0x7F80) == 0x7F80))
    if dtype == "F32":  # a sum is cheaper than a mask, and finite nearly always
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(array.sum(dtype=np.float32)):
                return 0
    return int(array.size - np.count_nonzero(np.isfinite(array)))
