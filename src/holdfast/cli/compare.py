"""Two sets of tensors, element by element: what differs, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from holdfast.catalog.source import Source
from holdfast.cli.elements import WITHOUT_NUMBERS, boxes, is_integer, numbers
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import TensorEntry
from holdfast.format.region import Region
from holdfast.tensors.lazy import Tensors
from holdfast.tensors.numbers import Array

State = Literal["equal", "differs", "dtype", "shape", "only in a", "only in b"]


@dataclass(frozen=True, slots=True)
class ComparedTensor:
    """One of two tensors that are compared."""

    tensors: Tensors
    name: str
    """In `tensors`."""

    source: Source | None = None
    entry: TensorEntry | None = None
    """Where it lies as it is, if it lies so in one place."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What is known of one name."""

    name: str
    state: State
    dtypes: tuple[str | None, str | None]
    """In a, and in b."""

    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    num_elements: int = 0
    num_differing: int = 0
    max_abs: float = 0.0
    """Largest difference; infinite where one of two is no number."""

    max_rel: float = 0.0
    """Largest difference as a share of the larger of the two."""

    by_checksum: bool = False
    """Whether all of it was compared by checksums, and none was read."""

    @property
    def same(self) -> bool:
        """Whether dtype, shape and every number are."""
        return self.state == "equal"


def compare(
    name: str,
    a: ComparedTensor | None,
    b: ComparedTensor | None,
    advance: Callable[[int], None] = lambda _: None,
) -> Difference:
    """What differs between two tensors: `dtype` where the numbers are equal and kept otherwise.

    Reads only chunks whose checksums differ, if both sides have them and are cut alike.

    Raises:
        DamagedError: elements that are not those that were written.
    """
    held = [None if side is None else side.tensors.infos[side.name] for side in (a, b)]
    dtypes = (held[0].dtype if held[0] else None, held[1].dtype if held[1] else None)
    shapes = (held[0].shape if held[0] else None, held[1].shape if held[1] else None)
    if a is None or b is None:
        return Difference(name, "only in a" if b is None else "only in b", dtypes, shapes)
    if shapes[0] != shapes[1]:
        return Difference(name, "shape", dtypes, shapes)
    shape = shapes[0] or ()
    whole = Region.whole(shape)
    regions = list(_differing_chunks(a, b, whole))
    count, largest, share = 0, 0.0, 0.0
    itemsize = max(dtype_of(dtype).itemsize for dtype in dtypes if dtype)
    for region in regions:
        for box in boxes(region, itemsize):
            pair = [side.tensors.read(side.name, box) for side in (a, b)]
            found = _differences(pair[0], pair[1], dtypes)
            count += found[0]
            largest, share = max(largest, found[1]), max(share, found[2])
            advance(box.num_elements * itemsize)
    state: State = "equal" if dtypes[0] == dtypes[1] else "dtype"
    return Difference(
        *(name, "differs" if count else state, dtypes, shapes, whole.num_elements),
        *(count, largest, share, not regions and whole.num_elements > 0),
    )


def nbytes_to_read(a: ComparedTensor, b: ComparedTensor) -> int:
    """Of each side, for a progress bar."""
    held = a.tensors.infos[a.name], b.tensors.infos[b.name]
    if held[0].shape != held[1].shape:
        return 0
    itemsize = max(dtype_of(one.dtype).itemsize for one in held)
    regions = _differing_chunks(a, b, Region.whole(held[0].shape))
    return sum(region.num_elements * itemsize for region in regions)


def _differing_chunks(a: ComparedTensor, b: ComparedTensor, whole: Region) -> Iterator[Region]:
    """The regions that have to be read: those of chunks without checksums, or with other ones."""
    if a.entry is None or b.entry is None or a.entry.dtype != b.entry.dtype:
        yield whole
        return
    chunks = [{(c.region.start, c.region.stop): c for c in e.chunks} for e in (a.entry, b.entry)]
    if chunks[0].keys() != chunks[1].keys():
        yield whole
        return
    itemsize = dtype_of(a.entry.dtype).itemsize
    for at, chunk in chunks[0].items():
        nbytes = chunk.region.num_elements * itemsize
        sums = [
            side.source.checksums(one, nbytes) if side.source else None
            for side, one in ((a, chunk), (b, chunks[1][at]))
        ]
        if (sums[0] is None or sums[0] != sums[1]) and nbytes:
            yield chunk.region


def _differences(
    a: Array, b: Array, dtypes: tuple[str | None, str | None]
) -> tuple[int, float, float]:
    """How many elements differ, by how much at most, and as what share of the larger."""
    if dtypes[0] == dtypes[1]:
        if np.array_equal(_bits(a), _bits(b)):
            return 0, 0.0, 0.0
        if dtypes[0] in WITHOUT_NUMBERS:
            return int((a != b).sum()), np.inf, np.inf
    first, second = numbers(a, dtypes[0] or ""), numbers(b, dtypes[1] or "")
    with np.errstate(all="ignore"):
        differs = (first != second) & ~(np.isnan(first) & np.isnan(second))
        if dtypes[0] == dtypes[1] and is_integer(dtypes[0]):
            differs = a != b  # As floats, two large ones could be one.
        apart = np.abs(first - second)[differs]
        apart = np.where(np.isnan(apart), np.inf, apart)
        larger = np.maximum(np.abs(first), np.abs(second))[differs]
        shares = np.where(np.isfinite(apart), apart / larger, np.inf)
    count = int(differs.sum())
    return (count, float(apart.max()), float(shares.max())) if count else (0, 0.0, 0.0)


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
