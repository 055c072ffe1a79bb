"""Divide boxes and ranges of bytes into pieces of limited size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from holdfast.format.region import Region

T = TypeVar("T")


def divide(region: Region, num_elements_max: int) -> Iterator[Region]:
    """Divide a region into boxes of at most `num_elements_max` elements, in row-major order. Each
    box is a range of indices along the region's first dim longer than 1. If a single index has too
    many elements, its elements are divided in the same way, along the next dim."""
    if region.num_elements <= num_elements_max:
        yield region
        return
    dim = dim_of_rows(region)
    num_rows = max(1, num_elements_max // (region.num_elements // region.shape[dim]))
    for rows in divide_rows(region, dim, num_rows):
        yield from divide(rows, num_elements_max)


def dim_of_rows(region: Region) -> int:
    """Return the first dim longer than 1. The region must have several elements."""
    return next(dim for dim, size in enumerate(region.shape) if size > 1)


def divide_rows(region: Region, dim: int, num_rows: int) -> Iterator[Region]:
    """Divide a region into boxes that are `num_rows` long in dim `dim`. The last may be shorter."""
    for first in range(region.start[dim], region.stop[dim], num_rows):
        last = min(first + num_rows, region.stop[dim])
        start = (*region.start[:dim], first, *region.start[dim + 1 :])
        stop = (*region.stop[:dim], last, *region.stop[dim + 1 :])
        yield Region(start, stop)


def aligned(start: int, stop: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Divide the range of bytes from `start` to `stop` at all multiples of `nbytes`. Yield the
    start and stop of each part."""
    while start < stop:
        end = min((start // nbytes + 1) * nbytes, stop)
        yield start, end
        start = end


def grouped(
    items: Iterable[T], nbytes_of: Callable[[T], int], nbytes_max: int
) -> Iterator[list[T]]:
    """Yield groups of consecutive items. A group has at most `nbytes_max` bytes, or a single larger
    item."""
    group: list[T] = []
    total = 0
    for item in items:
        nbytes = nbytes_of(item)
        if group and total + nbytes > nbytes_max:
            yield group
            group, total = [], 0
        group.append(item)
        total += nbytes
    if group:
        yield group
