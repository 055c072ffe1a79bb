"""A tensor in boxes that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from holdfast.format.region import Region
from holdfast.format.torchzip import contiguous_strides


def blocks(shape: Sequence[int], itemsize: int, nbytes_max: int) -> Iterator[Region]:
    """A tensor in boxes of at most so many bytes, each contiguous, in the order of its elements."""
    whole = Region.whole(shape)
    if whole.num_elements * itemsize <= nbytes_max or not whole.num_elements:
        yield whole
        return
    yield from _blocks(whole, 0, itemsize, nbytes_max)


def runs(box: Region, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The stretches of a row-major tensor of `shape` that a box is made of, in the order of its
    elements: the first element of each, and how many."""
    if not box.num_elements:
        return
    strides = contiguous_strides(tuple(shape))
    # Dims from here on are there in full, and so lie in one stretch with the one before.
    inner = len(shape)
    while inner and (box.start[inner - 1], box.stop[inner - 1]) == (0, shape[inner - 1]):
        inner -= 1
    last = max(inner - 1, 0)
    length = prod(box.shape[last:])
    first = box.start[last] * strides[last] if shape else 0
    for index in product(*(range(box.start[d], box.stop[d]) for d in range(last))):
        yield first + sum(i * s for i, s in zip(index, strides, strict=False)), length


def _blocks(region: Region, dim: int, itemsize: int, nbytes_max: int) -> Iterator[Region]:
    size = region.shape[dim]
    row = region.num_elements // size * itemsize
    # A power of two: then blocks begin where heads do.
    rows = 1 << (max(1, nbytes_max // row).bit_length() - 1)
    for first in range(region.start[dim], region.stop[dim], rows):
        last = min(first + rows, region.stop[dim])
        start = (*region.start[:dim], first, *region.start[dim + 1 :])
        stop = (*region.stop[:dim], last, *region.stop[dim + 1 :])
        piece = Region(start, stop)
        if piece.num_elements * itemsize > nbytes_max and dim + 1 < len(start):
            yield from _blocks(piece, dim + 1, itemsize, nbytes_max)
        else:
            yield piece
