"""Dtypes of torch: their sizes, and their names in torch's files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from holdfast.errors import FormatError


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype of torch."""

    name: str
    """Name in `torch`, such as `bfloat16`."""

    itemsize: int
    """Bytes per element."""

    storage: str | None
    """Name of the storage class in `torch` that pickles use for this dtype. None if torch pickles
    an `UntypedStorage` and, separately, the dtype."""


BY_NAME = {
    dtype.name: dtype
    for dtype in (
        Dtype("float64", 8, "DoubleStorage"),
        Dtype("float32", 4, "FloatStorage"),
        Dtype("float16", 2, "HalfStorage"),
        Dtype("bfloat16", 2, "BFloat16Storage"),
        Dtype("int64", 8, "LongStorage"),
        Dtype("int32", 4, "IntStorage"),
        Dtype("int16", 2, "ShortStorage"),
        Dtype("int8", 1, "CharStorage"),
        Dtype("uint8", 1, "ByteStorage"),
        Dtype("bool", 1, "BoolStorage"),
        Dtype("complex128", 16, "ComplexDoubleStorage"),
        Dtype("complex64", 8, "ComplexFloatStorage"),
        Dtype("complex32", 4, None),
        Dtype("uint64", 8, None),
        Dtype("uint32", 4, None),
        Dtype("uint16", 2, None),
        Dtype("float8_e4m3fn", 1, None),
        Dtype("float8_e4m3fnuz", 1, None),
        Dtype("float8_e5m2", 1, None),
        Dtype("float8_e5m2fnuz", 1, None),
        Dtype("float8_e8m0fnu", 1, None),
        Dtype("float4_e2m1fn_x2", 1, None),
    )
}

BY_STORAGE = {dtype.storage: dtype for dtype in BY_NAME.values() if dtype.storage}


@lru_cache(maxsize=1024)
def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor's elements. Cached: thousands have the same dtype and shape.

    Raises:
        FormatError: see `dtype_of`.
    """
    return prod(shape) * dtype_of(dtype).itemsize


def dtype_of(name: str) -> Dtype:
    """Return the dtype with this name.

    Raises:
        FormatError: torch has no such dtype, or its elements are not plain numbers.
    """
    try:
        return BY_NAME[name]
    except KeyError:
        raise FormatError(
            f"unknown dtype: `{name}`", hint=f"known dtypes: {', '.join(BY_NAME)}"
        ) from None
