"""Read a stored tensor with numpy, without torch: its statistics and its first elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import UsageError
from holdfast.format.dtypes import dtype_of
from holdfast.format.region import Region
from holdfast.tensors.blocks import blocks
from holdfast.tensors.lazy import Tensors
from holdfast.tensors.numbers import Array, convert, is_floating

WINDOW_BYTES = 8 << 20
"""Maximum bytes of one tensor that are in memory at a time."""

CORNER = 6
"""Maximum number of rows, and of columns, that `corner` returns."""

WITHOUT_NUMBERS = ("complex32", "float4_e2m1fn_x2")
"""Dtypes that numpy cannot compute with. Only the bits of their elements are compared."""


def is_integer(dtype: str | None) -> bool:
    """Whether elements of this dtype are integers or bools."""
    return dtype is not None and dtype.startswith(("int", "uint", "bool"))


def numbers(elements: Array, dtype: str) -> NDArray[np.float64 | np.complex128]:
    """Convert elements to float64 or complex128. `dtype`: their dtype in torch."""
    if dtype in WITHOUT_NUMBERS:
        raise UsageError(f"statistics and values of `{dtype}` tensors are not supported")
    if dtype.startswith("complex"):
        return elements.astype(np.complex128)
    if is_floating(dtype):
        return convert(elements, dtype, "float64").view(np.float64)
    return elements.astype(np.float64)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of a tensor's elements; for complex elements, of their absolute values."""

    num_elements: int
    num_zeros: int
    num_nan: int
    num_inf: int
    least: float
    """Minimum of the finite elements. The three fields below also use only finite elements. All
    four are NaN if no element is finite."""

    greatest: float
    mean: float
    std: float


def statistics(
    tensors: Tensors, name: str, advance: Callable[[int], None] = lambda _: None
) -> Statistics:
    """Compute the statistics of one tensor, reading at most `WINDOW_BYTES` at a time.

    `advance`: function that takes the number of bytes read since its last call.

    Raises:
        DamagedError: elements do not match their checksum.
        UsageError: the dtype is in `WITHOUT_NUMBERS`.
    """
    held = tensors.infos[name]
    itemsize = dtype_of(held.dtype).itemsize
    num_finite, num_zeros, num_nan, num_inf = 0, 0, 0, 0
    least, greatest, mean, squares = np.inf, -np.inf, 0.0, 0.0
    for box in boxes(Region.whole(held.shape), itemsize):
        elements = numbers(tensors.read(name, box), held.dtype)
        elements = np.abs(elements) if np.iscomplexobj(elements) else elements
        advance(box.num_elements * itemsize)
        num_zeros += int((elements == 0).sum())
        num_nan += int(np.isnan(elements).sum())
        num_inf += int(np.isinf(elements).sum())
        finite = elements[np.isfinite(elements)]
        if not finite.size:
            continue
        least = min(least, float(finite.min()))
        greatest = max(greatest, float(finite.max()))
        # Chan, Golub, LeVeque 1979: combine means and squared deviations of two sets.
        delta, count = float(finite.mean()) - mean, num_finite + finite.size
        squares += float(finite.var()) * finite.size + delta**2 * num_finite * finite.size / count
        mean += delta * finite.size / count
        num_finite = count
    if num_finite:
        std = sqrt(squares / num_finite)
    else:
        least = greatest = mean = std = float("nan")
    return Statistics(
        num_elements=Region.whole(held.shape).num_elements,
        num_zeros=num_zeros,
        num_nan=num_nan,
        num_inf=num_inf,
        least=float(least),
        greatest=float(greatest),
        mean=mean,
        std=std,
    )


def corner(tensors: Tensors, name: str) -> list[list[int | float | str]]:
    """Return rows of a tensor's first elements: at most `CORNER` along each of the last two dims,
    at index 0 of all other dims.

    Complex elements are returned as text.
    """
    held = tensors.infos[name]
    sizes = [1] * max(len(held.shape) - 2, 0) + [CORNER] * min(len(held.shape), 2)
    stop = tuple(map(min, sizes, held.shape))
    elements = tensors.read(name, Region((0,) * len(stop), stop))
    width = stop[-1] if stop and stop[-1] else 1
    if is_integer(held.dtype):
        # Not converted to float64, which is exact only for integers of up to 53 bits.
        integers: list[list[int | float | str]] = elements.reshape(-1, width).tolist()
        return integers
    rows: list[list[Any]] = numbers(elements, held.dtype).reshape(-1, width).tolist()
    if held.dtype.startswith("complex"):
        rows = [[f"{number.real:.5g}{number.imag:+.5g}j" for number in row] for row in rows]
    return rows


def boxes(region: Region, itemsize: int) -> Iterator[Region]:
    """Yield boxes of at most `WINDOW_BYTES` that cover a region."""
    for box in blocks(region.shape, itemsize, WINDOW_BYTES):
        yield box.moved(region.start)
