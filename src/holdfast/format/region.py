"""Regions: boxes of elements inside a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from operator import add, le, sub

from holdfast.errors import FormatError


@dataclass(frozen=True, slots=True)
class Region:
    """A box of elements: `start[d] <= index[d] < stop[d]` along each dim `d`.

    >>> Region((0, 4), (8, 8)) & Region((6, 0), (10, 6))
    Region(start=(6, 4), stop=(8, 6))
    """

    start: tuple[int, ...]
    """First element along each dim, inclusive."""

    stop: tuple[int, ...]
    """One past the last element along each dim. Equals `start` along a dim without elements."""

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(
                f"start and stop need the same dims: got {len(self.start)} and {len(self.stop)}"
            )
        if all(map(le, self.start, self.stop)) and min(self.start, default=0) >= 0:
            return
        for dim, (start, stop) in enumerate(zip(self.start, self.stop, strict=True)):
            if not 0 <= start <= stop:
                raise ValueError(f"dim {dim}: need 0 <= start <= stop, got {start} and {stop}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """Return the region of all elements of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    def __and__(self, other: Region) -> Region:
        """Return the intersection, which is an empty region if the boxes do not overlap."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(max, start, map(min, self.stop, other.stop)))
        return Region(start, stop)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stop, self.start))

    @property
    def num_elements(self) -> int:
        return prod(map(sub, self.stop, self.start))

    def is_whole(self, shape: tuple[int, ...]) -> bool:
        """Return whether the region has all elements of a tensor of this shape."""
        return self.stop == shape and not any(self.start)

    def within(self, outer: Region) -> Region:
        """Return the region relative to `outer`, which contains it."""
        origin = outer.start
        return Region(tuple(map(sub, self.start, origin)), tuple(map(sub, self.stop, origin)))

    def moved(self, offset: Sequence[int]) -> Region:
        """Return the region shifted by `offset[d]` along each dim `d`."""
        return Region(tuple(map(add, self.start, offset)), tuple(map(add, self.stop, offset)))

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether the region is inside a tensor of this shape."""
        return len(self.stop) == len(shape) and all(map(int.__le__, self.stop, shape))

    def slices(self) -> tuple[slice, ...]:
        return tuple(map(slice, self.start, self.stop))


def boxes_of_run(shape: Sequence[int], start: int, count: int) -> Iterator[Region]:
    """Yield the boxes that `count` consecutive elements of a tensor make up. The first element is
    number `start` in row-major order. All whole rows are one box; the incomplete rows before and
    after them are further boxes.

    >>> [(box.start, box.stop) for box in boxes_of_run((3, 4), 2, 7)]
    [((0, 2), (1, 4)), ((1, 0), (2, 4)), ((2, 0), (3, 1))]
    """
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


PAIRS_MAX = 500_000
"""Maximum number of pairs of regions to compare, which takes seconds. Shards of any mesh need a few
thousand comparisons. A crafted file could need the square of its number of chunks."""


def first_overlap(regions: Iterable[Region]) -> tuple[Region, Region] | None:
    """Return two regions that share an element; None if no two do.

    Sorts the regions along the dim with the most different starts, and compares each region only
    with those that overlap it along this dim. In a grid of shards, these form one row.

    Raises:
        FormatError: more than `PAIRS_MAX` pairs would have to be compared.
    """
    filled = [region for region in regions if region.num_elements]
    if not filled or not filled[0].start:
        return (filled[0], filled[1]) if len(filled) > 1 else None
    dim = max(range(len(filled[0].start)), key=lambda d: len({r.start[d] for r in filled}))
    active: list[Region] = []
    num_pairs = 0
    for region in sorted(filled, key=lambda r: (r.start[dim], r.start)):
        active = [other for other in active if other.stop[dim] > region.start[dim]]
        num_pairs += len(active)
        if num_pairs > PAIRS_MAX:
            raise FormatError(f"{len(filled)} chunks are cut too unevenly to be compared")
        for other in active:
            if (other & region).num_elements:
                return other, region
        active.append(region)
    return None
