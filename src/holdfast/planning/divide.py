"""Divide boxes, runs of elements and ranges of bytes into pieces of limited size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import TypeVar

from holdfast.format.region import Region

T = TypeVar("T")


def divide(region: Region, num_elements_max: int) -> Iterator[Region]:
    """Divide a region into boxes of at most `num_elements_max` elements, in row-major order: rows
    of the first dim longer than 1, or parts of rows if one row has more elements."""
    if region.num_elements <= num_elements_max:
        yield region
        return
    dim = dim_of_rows(region)
    num_rows = max(1, num_elements_max // (region.num_elements // region.shape[dim]))
    for rows in divide_rows(region, dim, num_rows):
        yield from divide(rows, num_elements_max)


def dim_of_rows(region: Region) -> int:
    """The first dim longer than 1. A region of several elements has one."""
    return next(dim for dim, size in enumerate(region.shape) if size > 1)


def divide_rows(region: Region, dim: int, num_rows: int) -> Iterator[Region]:
    """Divide a region along one dim into boxes of `num_rows`; the last may be smaller."""
    for first in range(region.start[dim], region.stop[dim], num_rows):
        last = min(first + num_rows, region.stop[dim])
        start = (*region.start[:dim], first, *region.start[dim + 1 :])
        stop = (*region.stop[:dim], last, *region.stop[dim + 1 :])
        yield Region(start, stop)


def boxes_of_run(shape: Sequence[int], start: int, count: int) -> Iterator[Region]:
    """Boxes that make up `count` consecutive elements of a tensor, from number `start` in row-major
    order: all whole rows as one box, and the parts of rows before and after them."""
    if not shape:
        yield Region((), ())
        return
    row = prod(shape[1:])
    first, skipped = divmod(start, row)
    if skipped or count < row:
        head = min(row - skipped, count)
        yield from _in_row(first, boxes_of_run(shape[1:], skipped, head))
        first, count = first + 1, count - head
    num_rows = count // row
    if num_rows:
        zeros = (0,) * (len(shape) - 1)
        yield Region((first, *zeros), (first + num_rows, *shape[1:]))
    if count > num_rows * row:
        yield from _in_row(first + num_rows, boxes_of_run(shape[1:], 0, count - num_rows * row))


def _in_row(row: int, boxes: Iterator[Region]) -> Iterator[Region]:
    return (Region((row, *box.start), (row + 1, *box.stop)) for box in boxes)


def aligned(start: int, stop: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Divide a range of bytes at the multiples of `nbytes`."""
    while start < stop:
        end = min((start // nbytes + 1) * nbytes, stop)
        yield start, end
        start = end


def grouped(
    items: Iterable[T], nbytes_of: Callable[[T], int], nbytes_max: int
) -> Iterator[list[T]]:
    """Groups of consecutive items of at most `nbytes_max` together, or one larger item."""
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
