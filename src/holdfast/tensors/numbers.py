"""Conversion of elements between dtypes, including those that numpy lacks.

bfloat16 and the 8-bit floats are stored as unsigned integers with the same bits. Rounding is to
nearest, ties to even, as in torch.
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

ELEMENTS_AT_ONCE = 1 << 18
"""Elements converted at a time, few enough that intermediate arrays stay in the CPU cache."""

_NOT_IN_NUMPY = ("bfloat16", "float8", "float4", "complex32")
_BITS = {1: "u1", 2: "<u2", 4: "<u4"}
_FLOAT8 = {
    # Bits of the exponent, bits of the mantissa, bias of the exponent.
    "float8_e4m3fn": (4, 3, 7),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2": (5, 2, 15),
    "float8_e5m2fnuz": (5, 2, 16),
}


def raw_type(dtype: str) -> np.dtype[np.generic]:
    """Return the numpy dtype for elements of torch's `dtype`. If numpy lacks this dtype, return an
    unsigned integer type of the same size."""
    itemsize = dtype_of(dtype).itemsize
    return np.dtype(_BITS[itemsize] if dtype.startswith(_NOT_IN_NUMPY) else dtype)


def box_of(array: Array, region: Region) -> Array:
    """Return a view of the box `region` of an array. The array may have no dims."""
    # Indexing an array without dims would return a scalar, which is not a view.
    return np.asarray(array[region.slices()] if region.start else array)


def is_floating(dtype: str) -> bool:
    """Return whether `dtype` is a floating-point dtype. Only floating-point dtypes can be converted
    to one another."""
    return dtype.startswith(("float", "bfloat"))


QUANTIZED_FLOATS = ("float8", "float4")
"""Prefixes of floating-point dtypes whose numbers mean nothing without scale factors."""


def is_packed(dtype: str) -> bool:
    """Return whether weights of this dtype are quantized, so that they mean nothing without scale
    factors."""
    return not is_floating(dtype) or dtype.startswith(QUANTIZED_FLOATS)


def convert(elements: Array, source: str, target: str) -> Array:
    """Return the elements in another floating-point dtype. If both dtypes are equal, return the
    array itself."""
    if source == target:
        return elements
    convert_part = _converter(source, target)
    result = np.empty(elements.shape, raw_type(target))
    flat = np.ascontiguousarray(elements).reshape(-1)
    out = result.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, ELEMENTS_AT_ONCE):
            stop = start + ELEMENTS_AT_ONCE
            out[start:stop] = convert_part(flat[start:stop])
    return result


_INFINITE = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""Bits of positive infinity in each 16-bit dtype."""


def too_large(elements: Array, source: str, converted: Array, target: str) -> float | None:
    """Return a finite number of `elements` that became infinite in `converted`; None if none did.

    Both arrays have the same shape and the raw types of their dtypes.
    """
    if target not in (*_INFINITE, "float32") or source in (target, *_FLOAT8):
        return None
    if target in _INFINITE:
        infinite = (converted.view(np.uint16) & 0x7FFF) == _INFINITE[target]
    else:
        infinite = np.isinf(converted)
    if not infinite.any():
        return None
    before = elements[infinite]
    numbers = before if source.startswith("float") else _from_bfloat16(before)
    finite = numbers[np.isfinite(numbers)]
    return float(finite[0]) if finite.size else None


def floats(elements: Array, dtype: str) -> Floats:
    """Return the elements as float32."""
    return convert(elements, dtype, "float32").view(np.float32)


def _converter(source: str, target: str) -> Callable[[Array], Array]:
    plain = {"float64", "float32", "float16"}
    if source in plain and target in plain:
        return lambda part: part.astype(target)
    if target == "bfloat16" and source in plain:
        return lambda part: _to_bfloat16(part.astype(np.float32, copy=False))
    if source == "bfloat16" and target in plain:
        return lambda part: _from_bfloat16(part).astype(target, copy=False)
    if source in _FLOAT8 or source == "float8_e8m0fnu":
        values = _values(source)
        if target in (*plain, "bfloat16"):
            value_of_byte = convert(values, "float32", target)
            return lambda part: value_of_byte[part]
    raise UsageError(
        f"cannot convert {source} to {target}", hint="choose float32, bfloat16 or float16"
    )


def _from_bfloat16(bits: Array) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bfloat16(numbers: Floats) -> Array:
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    last_bit = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + last_bit + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(numbers)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded


@cache
def _values(dtype: str) -> Floats:
    """Return the number that each of the 256 possible bytes stands for."""
    byte, values = np.arange(256), np.empty(256)
    if dtype == "float8_e8m0fnu":
        values[:] = np.ldexp(1.0, byte - 127)
        values[0xFF] = np.nan
        return values.astype(np.float32)
    exponent_bits, mantissa_bits, bias = _FLOAT8[dtype]
    one = 1 << mantissa_bits
    exponent, mantissa = np.divmod(byte & 0x7F, one)
    scale = np.maximum(exponent, 1) - bias - mantissa_bits
    values[:] = np.ldexp(np.where(exponent, one + mantissa, mantissa).astype(np.float64), scale)
    if dtype == "float8_e5m2":
        highest = exponent == (1 << exponent_bits) - 1
        values[highest] = np.where(mantissa[highest], np.nan, np.inf)
    values *= np.where(byte & 0x80, -1.0, 1.0)
    if dtype.endswith("fnuz"):
        values[0x80] = np.nan
    elif dtype == "float8_e4m3fn":
        values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)
