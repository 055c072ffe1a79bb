"""From what is wanted to what is to be read: pure values in, pure values out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from holdfast.errors import DamagedError
from holdfast.format.checksum import BLOCK_BYTES
from holdfast.format.manifest import Chunk, TensorEntry
from holdfast.format.region import Region, first_overlap
from holdfast.format.torchzip import contiguous_strides

RUN_BYTES_MIN = BLOCK_BYTES
"""Runs at least this long are read one by one; shorter ones together with the gaps between them."""


@dataclass(frozen=True, slots=True)
class ReadItem:
    """Elements to bring from one chunk."""

    chunk: Chunk
    region: Region
    """Of the tensor as a whole."""


def read_items(name: str, entry: TensorEntry, wanted: Region) -> list[ReadItem]:
    """Where each element of `wanted` comes from.

    Raises:
        DamagedError: the chunks do not hold every one of them exactly once.
    """
    if len(entry.chunks) == 1 and entry.chunks[0].region == wanted and wanted.num_elements:
        return [ReadItem(entry.chunks[0], wanted)]
    found = []
    for chunk in entry.chunks:
        region = chunk.region & wanted
        if region.num_elements:
            found.append(ReadItem(chunk, region))
    held = sum(move.region.num_elements for move in found)
    overlap = first_overlap(move.region for move in found)
    if held != wanted.num_elements or overlap:
        raise DamagedError(
            f"`{name}`: its chunks hold {held} of the {wanted.num_elements} elements of {wanted}"
            + (f", and some twice: {overlap[0]} and {overlap[1]}" if overlap else ""),
            hint="the checkpoint is incomplete: resume from another step",
        )
    return found


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A stretch of a chunk's raw data, and the box of wanted elements that lies in it."""

    start: int
    """First byte, counted from the start of the raw data: that of the box's first element."""

    stop: int
    """One past the last byte: that of the box's last element."""

    box: Region
    """Counted from the first wanted element."""

    contiguous: bool
    """Whether the stretch holds the box and nothing else."""


def byte_ranges(
    box: Region, shape: tuple[int, ...], itemsize: int, window_bytes: int
) -> Iterator[ByteRange]:
    """How to read `box` out of a row-major chunk of `shape`: every wanted byte in one part only.

    Contiguous elements come as one part, whatever their number. Where there are gaps, a part
    spans at most `window_bytes`, or is one run; so at most `row / slice` times the wanted bytes are
    read when each row of `row` bytes is wanted in `slice` of them, and never more than that.
    """
    strides = [stride * itemsize for stride in contiguous_strides(shape)]
    yield from _parts(box, box.start, strides, itemsize, window_bytes)


def _parts(
    box: Region, origin: tuple[int, ...], strides: list[int], itemsize: int, window_bytes: int
) -> Iterator[ByteRange]:
    if not box.num_elements:
        return
    start = sum(i * s for i, s in zip(box.start, strides, strict=True))
    stop = sum((i - 1) * s for i, s in zip(box.stop, strides, strict=True)) + itemsize
    contiguous = stop - start == box.num_elements * itemsize
    short_runs = _short_runs(box, strides, itemsize)
    if contiguous or (short_runs and stop - start <= window_bytes):
        yield ByteRange(start, stop, box.within(Region(origin, box.stop)), contiguous)
        return
    dim = next(d for d, size in enumerate(box.shape) if size > 1)
    rows = max(1, window_bytes // strides[dim]) if short_runs else 1
    for first in range(box.start[dim], box.stop[dim], rows):
        last = min(first + rows, box.stop[dim])
        piece = Region(
            (*box.start[:dim], first, *box.start[dim + 1 :]),
            (*box.stop[:dim], last, *box.stop[dim + 1 :]),
        )
        yield from _parts(piece, origin, strides, itemsize, window_bytes)


def _short_runs(box: Region, strides: list[int], itemsize: int) -> bool:
    """Whether the elements lie in runs too short to be read one by one."""
    run = itemsize
    for size, stride in zip(reversed(box.shape), reversed(strides), strict=True):
        if stride == run:
            run *= size
        elif size > 1:
            break
    return run < RUN_BYTES_MIN
