"""Plan a read: find the chunks that hold the wanted elements, and the bytes to read of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from holdfast.errors import DamagedError
from holdfast.format.checksum import BLOCK_BYTES
from holdfast.format.manifest import Chunk, TensorEntry
from holdfast.format.region import Region, first_overlap
from holdfast.format.torchzip import contiguous_strides
from holdfast.planning.divide import dim_of_rows, divide_rows

RUN_BYTES_MIN = BLOCK_BYTES
"""Shortest run of contiguous bytes that is read alone. Shorter runs are read together with the gaps
between them."""


COLUMN_BYTES_MAX = 8 * BLOCK_BYTES
"""Length from which each rank reads a run of contiguous bytes for itself: this costs at most two
blocks more than the run has. A box with shorter runs counts as a box of columns: one rank can read
the rows around it, for all ranks that want columns of these rows."""


class ReadItem(NamedTuple):
    """Box of elements to read from one chunk."""

    chunk: Chunk
    region: Region
    """Position of the box in the whole tensor."""


def read_items(name: str, entry: TensorEntry, wanted: Region) -> list[ReadItem]:
    """Find the chunks that hold the elements of `wanted`.

    Raises:
        DamagedError: an element is in no chunk, or in more than one.
    """
    if len(entry.chunks) == 1 and entry.chunks[0].region == wanted and wanted.num_elements:
        return [ReadItem(entry.chunks[0], wanted)]
    items = []
    for chunk in entry.chunks_in(wanted):
        region = chunk.region & wanted
        if region.num_elements:
            items.append(ReadItem(chunk, region))
    num_stored = sum(item.region.num_elements for item in items)
    overlap = first_overlap(item.region for item in items)
    if num_stored != wanted.num_elements or overlap:
        raise DamagedError(
            f"`{name}`: its chunks hold {num_stored} of the {wanted.num_elements} elements of "
            f"{wanted}" + (f", and some twice: {overlap[0]} and {overlap[1]}" if overlap else ""),
            hint="the checkpoint is incomplete: resume from another step",
        )
    return items


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Range of a chunk's data, and the box of wanted elements that it contains."""

    start: int
    """Offset of the box's first element in the chunk's data."""

    stop: int
    """Offset of the end of the box's last element."""

    box: Region
    """Position of the box, relative to the first wanted element."""

    contiguous: bool
    """Whether the range holds only elements of the box."""


def byte_ranges(
    box: Region, shape: tuple[int, ...], itemsize: int, window_bytes: int
) -> Iterator[ByteRange]:
    """Yield the ranges of bytes to read for `box`, a part of a row-major chunk of `shape`. Each
    element of `box` is in exactly one range.

    If all elements of `box` are contiguous, they are one range of any length. If there are gaps
    between them, a range is either one contiguous run, or spans at most `window_bytes`, gaps
    included. For `slice` wanted bytes in each row of `row` bytes, the ranges have at most `row /
    slice` times the wanted bytes.
    """
    if box.is_whole(shape):
        if box.num_elements:
            yield ByteRange(0, box.num_elements * itemsize, box, contiguous=True)
        return
    strides = [stride * itemsize for stride in contiguous_strides(shape)]
    yield from _ranges(box, box.start, strides, itemsize, window_bytes)


def _ranges(
    box: Region, origin: tuple[int, ...], strides: list[int], itemsize: int, window_bytes: int
) -> Iterator[ByteRange]:
    if not box.num_elements:
        return
    start = sum(i * s for i, s in zip(box.start, strides, strict=True))
    stop = sum((i - 1) * s for i, s in zip(box.stop, strides, strict=True)) + itemsize
    contiguous = stop - start == box.num_elements * itemsize
    short_runs = _run_bytes(box, strides, itemsize) < RUN_BYTES_MIN
    if contiguous or (short_runs and stop - start <= window_bytes):
        yield ByteRange(start, stop, box.within(Region(origin, box.stop)), contiguous)
        return
    dim = dim_of_rows(box)
    num_rows = max(1, window_bytes // strides[dim]) if short_runs else 1
    for rows in divide_rows(box, dim, num_rows):
        yield from _ranges(rows, origin, strides, itemsize, window_bytes)


def _run_bytes(box: Region, strides: list[int], itemsize: int) -> int:
    """Return the length in bytes of the contiguous runs of the box."""
    run = itemsize
    for size, stride in zip(reversed(box.shape), reversed(strides), strict=True):
        if stride == run:
            run *= size
        elif size > 1:
            break
    return run


def rows_around(box: Region, shape: tuple[int, ...], itemsize: int) -> Region | None:
    """Return the smallest contiguous box around `box`, a box of columns in a row-major chunk of
    `shape`. Return None for other boxes: those that are contiguous or have long runs.

    >>> rows_around(Region((2, 4), (8, 6)), (10, 10), 4)
    Region(start=(2, 0), stop=(8, 10))
    """
    strides = [stride * itemsize for stride in contiguous_strides(shape)]
    if box.num_elements < 2 or _run_bytes(box, strides, itemsize) >= COLUMN_BYTES_MAX:
        return None
    inner = dim_of_rows(box) + 1
    start = (*box.start[:inner], *[0] * (len(shape) - inner))
    rows = Region(start, (*box.stop[:inner], *shape[inner:]))
    return None if rows == box else rows
