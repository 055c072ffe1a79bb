"""Pieces of a tensor on one rank, computed from the splits by each mesh axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from holdfast.format.region import Region

Interval = tuple[int, int]
"""Half-open range of indices along one dim."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements that are one box of the whole tensor, and one box of the rank's own tensor."""

    region: Region
    """Position in the whole tensor."""

    local: Region
    """Position in the rank's own tensor."""

    def local_of(self, region: Region) -> Region:
        """Return the position in the rank's own tensor of `region`, a part of this piece."""
        if region == self.region:
            return self.local
        return region.within(self.region).moved(self.local.start)


@dataclass(frozen=True, slots=True)
class Split:
    """Split of one dim by one mesh axis, for one rank."""

    dim: int
    num_parts: int
    index: int
    """Index of this rank's part."""

    num_strides: int = 1
    """Number of equal sections of the dim, each of which is split into parts: above 1 for torch's
    `_StridedShard`, used by FSDP over tensor parallelism."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Grid of ranks."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    """Ranks in row-major order."""


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Split of one dim by one mesh axis, for all ranks."""

    dim: int
    num_strides: int = 1


@dataclass(frozen=True, slots=True)
class MeshPlacement:
    """Mesh of a tensor, and the split of the tensor by each axis."""

    mesh: Mesh
    shards: tuple[ShardSpec | None, ...]
    """One `ShardSpec` per axis, applied in this order; None for an axis of replicas."""

    def splits_at(self, coordinate: Sequence[int]) -> list[Split]:
        """Return the splits for the rank at `coordinate` of the mesh."""
        return [
            Split(shard.dim, num_parts, index, shard.num_strides)
            for shard, num_parts, index in zip(
                self.shards, self.mesh.shape, coordinate, strict=True
            )
            if shard is not None
        ]


def pieces_of(shape: Sequence[int], splits: Sequence[Split]) -> tuple[Piece, ...]:
    """Return a rank's pieces after these splits, applied in order, without empty pieces.

    The parts have the sizes of `torch.chunk`: equal, except that the last ones may be smaller or
    empty. A tensor without elements has one empty piece, so that checkpoints contain it.
    """
    dims: list[list[Interval]] = [[(0, size)] for size in shape]
    for split in splits:
        dims[split.dim] = _part(dims[split.dim], split)
    if not all(shape):
        return (Piece(Region.whole(shape), Region.whole(shape)),)
    located = [_located(intervals) for intervals in dims]
    return tuple(
        Piece(
            Region(tuple(whole[0] for whole, _ in box), tuple(whole[1] for whole, _ in box)),
            Region(tuple(own[0] for _, own in box), tuple(own[1] for _, own in box)),
        )
        for box in product(*located)
    )


def _part(intervals: list[Interval], split: Split) -> list[Interval]:
    taken: list[Interval] = []
    length = sum(stop - start for start, stop in intervals)
    size = _part_size(length, split.num_strides)
    for start in range(0, length, size):
        stop = min(start + size, length)
        part_size = _part_size(stop - start, split.num_parts)
        part = start + part_size * split.index
        taken += _slice(intervals, part, min(part + part_size, stop))
    return _joined(taken)


def _part_size(length: int, num_parts: int) -> int:
    """Return the size of each part of a range of `length`. The last parts may be smaller."""
    return max(1, -(-length // num_parts))


def _slice(intervals: list[Interval], start: int, stop: int) -> list[Interval]:
    """Return the elements from `start` to `stop` of the concatenated intervals."""
    taken, before = [], 0
    for first, last in intervals:
        lo, hi = max(start - before, 0), min(stop - before, last - first)
        if lo < hi:
            taken.append((first + lo, first + hi))
        before += last - first
    return taken


def _joined(intervals: list[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, stop in intervals:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _located(intervals: list[Interval]) -> list[tuple[Interval, Interval]]:
    """Return each interval with its position in the rank's own tensor."""
    located, own_start = [], 0
    for start, stop in intervals:
        own_stop = own_start + stop - start
        located.append(((start, stop), (own_start, own_stop)))
        own_start = own_stop
    return located
