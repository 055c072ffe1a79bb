"""Elements as numpy holds them, the dtypes that it does not know among them, from one to another.

bfloat16 and the 8-bit floats are kept as their bits. Rounding is to the nearest, ties to even, as
torch does it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import UsageError
from holdfast.format.dtypes import dtype_of
from holdfast.format.region import Region

Array = NDArray[np.generic]
Floats = NDArray[np.float32]

AT_ONCE = 1 << 18
"""Elements converted at a time: what is between the two ends stays in cache."""

_KNOWN = {
    *("float64", "float32", "float16", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8", "bool", "complex128", "complex64"),
}
_BITS = {1: "u1", 2: "<u2", 4: "<u4"}
_EIGHT = {
    # Bits of exponent and mantissa, bias, and whether there are infinities and a negative zero.
    "float8_e4m3fn": (4, 3, 7),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2": (5, 2, 15),
    "float8_e5m2fnuz": (5, 2, 16),
}


def raw_type(dtype: str) -> np.dtype[np.generic]:
    """How numpy is to hold elements of torch's `dtype`: as they are, or by their bits."""
    return np.dtype(dtype if dtype in _KNOWN else _BITS[dtype_of(dtype).itemsize])


def box_of(array: Array, region: Region) -> Array:
    """A view of a box, of a tensor without dims too."""
    # Of an array without dims numpy would give a number, which is no view.
    return np.asarray(array[region.slices()] if region.start else array)


def is_floating(dtype: str) -> bool:
    """Whether these are floating-point numbers, which may be kept with fewer or more bits."""
    return dtype.startswith(("float", "bfloat"))


def convert(elements: Array, source: str, target: str) -> Array:
    """The same numbers in another floating-point dtype; the same array where that is no other.

    Raises:
        UsageError: there is no rule for these two.
    """
    if source == target:
        return elements
    step = _step(source, target)
    result = np.empty(elements.shape, raw_type(target))
    flat = np.ascontiguousarray(elements).reshape(-1)
    out = result.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, AT_ONCE):
            out[start : start + AT_ONCE] = step(flat[start : start + AT_ONCE])
    return result


def floats(elements: Array, dtype: str) -> Floats:
    """The numbers as float32."""
    return convert(elements, dtype, "float32").view(np.float32)


def _step(source: str, target: str) -> Callable[[Array], Array]:
    plain = {"float64", "float32", "float16"}
    if source in plain and target in plain:
        return lambda part: part.astype(target)
    if target == "bfloat16" and source in plain:
        return lambda part: _to_bfloat16(part.astype(np.float32, copy=False))
    if source == "bfloat16" and target in plain:
        return lambda part: _from_bfloat16(part).astype(target, copy=False)
    if source in _EIGHT or source == "float8_e8m0fnu":
        values = _values(source)
        if target in (*plain, "bfloat16"):
            kept = convert(values, "float32", target)
            return lambda part: kept[part]
    raise UsageError(
        f"cannot convert {source} to {target}", hint="float32, bfloat16 and float16 can be chosen"
    )


def _from_bfloat16(bits: Array) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bfloat16(numbers: Floats) -> Array:
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    last_kept = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + last_kept + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
    none = np.isnan(numbers)
    if none.any():
        rounded[none] = 0x7FC0
    return rounded


@cache
def _values(dtype: str) -> Floats:
    """The number that each of the 256 bytes stands for."""
    return np.array([_eight_bits(byte, dtype) for byte in range(256)], np.float32)


def _eight_bits(byte: int, dtype: str) -> float:
    if dtype == "float8_e8m0fnu":
        return float("nan") if byte == 0xFF else 2.0 ** (byte - 127)
    exponent_bits, mantissa_bits, bias = _EIGHT[dtype]
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = byte & ((1 << mantissa_bits) - 1)
    if dtype.endswith("fnuz"):
        if byte == 0x80:
            return float("nan")
    elif dtype == "float8_e4m3fn":
        if byte & 0x7F == 0x7F:
            return float("nan")
    elif exponent == (1 << exponent_bits) - 1:
        return float("nan") if mantissa else sign * float("inf")
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return float(sign * fraction * 2.0 ** (1 - bias))
    return float(sign * (1 + fraction) * 2.0 ** (exponent - bias))
