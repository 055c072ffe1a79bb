"""Boxes of bounded size that together cover a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from holdfast.format.region import Region
from holdfast.format.torchzip import contiguous_strides


def blocks(shape: Sequence[int], itemsize: int, nbytes_max: int) -> Iterator[Region]:
    """Yield boxes of at most `nbytes_max` bytes that cover a tensor.

    Each box is contiguous in a row-major tensor. Boxes come in the order of their elements.
    """
    region = Region.whole(shape)
    if region.num_elements * itemsize <= nbytes_max or not region.num_elements:
        yield region
        return
    yield from _split(region, 0, itemsize, nbytes_max)


def runs(box: Region, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the contiguous runs that make up a box of a row-major tensor of `shape`.

    A run is a pair: the index of its first element in the flat tensor, and its number of elements.
    Runs come in the order of their elements.
    """
    if not box.num_elements:
        return
    strides = contiguous_strides(tuple(shape))
    # Trailing dims that the box covers in full merge with the dim before them into longer runs.
    inner = len(shape)
    while inner and (box.start[inner - 1], box.stop[inner - 1]) == (0, shape[inner - 1]):
        inner -= 1
    last = max(inner - 1, 0)
    length = prod(box.shape[last:])
    first = box.start[last] * strides[last] if shape else 0
    for index in product(*(range(box.start[d], box.stop[d]) for d in range(last))):
        yield first + sum(i * s for i, s in zip(index, strides, strict=False)), length


def _split(region: Region, dim: int, itemsize: int, nbytes_max: int) -> Iterator[Region]:
    """Split a region along `dim` into boxes of at most `nbytes_max` bytes. If a single index along
    `dim` has more bytes, split it along the next dims."""
    row_nbytes = region.num_elements // region.shape[dim] * itemsize
    # A power of two, as most widths of heads are: a block then begins where a head does.
    rows = 1 << (max(1, nbytes_max // row_nbytes).bit_length() - 1)
    for first in range(region.start[dim], region.stop[dim], rows):
        last = min(first + rows, region.stop[dim])
        start = (*region.start[:dim], first, *region.start[dim + 1 :])
        stop = (*region.stop[:dim], last, *region.stop[dim + 1 :])
        piece = Region(start, stop)
        if piece.num_elements * itemsize > nbytes_max and dim + 1 < len(start):
            yield from _split(piece, dim + 1, itemsize, nbytes_max)
        else:
            yield piece
