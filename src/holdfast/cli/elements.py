"""The elements of a tensor as numbers: to compute with, to sum up, to look at. Without torch."""

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
"""Of one tensor, held at a time."""

CORNER = 6
"""Rows and columns that are looked at."""

WITHOUT_NUMBERS = ("complex32", "float4_e2m1fn_x2")
"""Dtypes whose elements are compared by their bits alone."""


def is_integer(dtype: str | None) -> bool:
    """Whether these are whole numbers."""
    return dtype is not None and dtype.startswith(("int", "uint", "bool"))


def numbers(elements: Array, dtype: str) -> NDArray[np.float64 | np.complex128]:
    """The elements as float64 or complex128, to compute with.

    Raises:
        UsageError: elements of this dtype are known by their bits alone.
    """
    if dtype in WITHOUT_NUMBERS:
        raise UsageError(f"there is no arithmetic with {dtype} here")
    if dtype.startswith("complex"):
        return elements.astype(np.complex128)
    if is_floating(dtype):
        return convert(elements, dtype, "float64").view(np.float64)
    return elements.astype(np.float64)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the elements of a tensor are like; of complex ones, their absolute values."""

    num_elements: int
    num_zeros: int
    num_nan: int
    num_inf: int
    least: float
    greatest: float
    mean: float
    std: float
    """These four over what is finite; not a number where nothing is."""


def statistics(
    tensors: Tensors, name: str, advance: Callable[[int], None] = lambda _: None
) -> Statistics:
    """Of one tensor, read in boxes.

    Raises:
        DamagedError: elements that are not those that were written.
        UsageError: there is no arithmetic with its dtype.
    """
    held = tensors.infos[name]
    itemsize = dtype_of(held.dtype).itemsize
    total, zeros, nans, infs = 0, 0, 0, 0
    least, greatest, mean, spread = np.inf, -np.inf, 0.0, 0.0
    for box in boxes(Region.whole(held.shape), itemsize):
        found = numbers(tensors.read(name, box), held.dtype)
        found = np.abs(found) if np.iscomplexobj(found) else found
        advance(box.num_elements * itemsize)
        zeros, nans = zeros + int((found == 0).sum()), nans + int(np.isnan(found).sum())
        infs += int(np.isinf(found).sum())
        found = found[np.isfinite(found)]
        if not found.size:
            continue
        least = min(least, float(found.min()))
        greatest = max(greatest, float(found.max()))
        # Chan, Golub, LeVeque 1979: means and squared deviations of two sets as those of one.
        apart, count = float(found.mean()) - mean, total + found.size
        spread += float(found.var()) * found.size + apart**2 * total * found.size / count
        mean += apart * found.size / count
        total = count
    if not total:
        least = greatest = mean = std = float("nan")
    else:
        std = sqrt(spread / total)
    whole = Region.whole(held.shape).num_elements
    return Statistics(whole, zeros, nans, infs, float(least), float(greatest), mean, std)


def corner(tensors: Tensors, name: str) -> list[list[int | float | str]]:
    """The first elements along the last two dims, at the first element of all others; complex ones
    as text."""
    held = tensors.infos[name]
    sizes = [1] * max(len(held.shape) - 2, 0) + [CORNER] * min(len(held.shape), 2)
    stop = tuple(map(min, sizes, held.shape))
    elements = tensors.read(name, Region((0,) * len(stop), stop))
    width = stop[-1] if stop and stop[-1] else 1
    if is_integer(held.dtype):
        # Not as floats, which hold no more than 53 bits of them.
        whole: list[list[int | float | str]] = elements.reshape(-1, width).tolist()
        return whole
    rows: list[list[Any]] = numbers(elements, held.dtype).reshape(-1, width).tolist()
    if held.dtype.startswith("complex"):
        rows = [[f"{one.real:.5g}{one.imag:+.5g}j" for one in row] for row in rows]
    return rows


def boxes(region: Region, itemsize: int) -> Iterator[Region]:
    """A region in boxes that fit into memory."""
    for box in blocks(region.shape, itemsize, WINDOW_BYTES):
        start, stop = (
            tuple(map(int.__add__, region.start, bound)) for bound in (box.start, box.stop)
        )
        yield Region(start, stop)
