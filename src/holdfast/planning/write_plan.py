"""Who writes what: pure values in, pure values out.

Each rank offers what it holds, tensors by how they lie over the ranks. From that any rank works out
its own part by itself, and rank 0 the part of all, by the same functions: no plan is sent.

What several ranks hold is shared out between them by bytes. All that the same ranks hold alike is
thought of as laid on one line, and the line cut into as many equal stretches as there are ranks; a
tensor that lies across a cut is cut there, at the next row. So every element is written once, the
ranks write about the same, and there are about as few chunks as there are tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import MismatchError
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Path
from holdfast.format.region import Region, first_overlap
from holdfast.format.structure import OPTIMIZERS, Node, with_optimizers
from holdfast.state.shard import Mesh, MeshPlacement, pieces_of

Ints = NDArray[np.int64]

STRETCH_BYTES_MIN = 1 << 20
"""What several ranks hold is not shared out in less."""


class LocalTensor(NamedTuple):
    """What a rank holds of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    placement: MeshPlacement | None = None
    """How the tensor lies over ranks; None: this rank has all of it."""

    shared_out: bool = True
    """Whether ranks that hold the same elements write a part each; else the first of them writes
    all: a checkpoint must not mix two ranks' versions."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * dtype_of(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """What a rank holds of one section of the state: of all names that begin alike, up to a dot."""

    tensors: dict[str, LocalTensor] = field(default_factory=dict)
    values: dict[str, Path] = field(default_factory=dict)
    aliases: dict[str, tuple[str, Path]] = field(default_factory=dict)
    """Second names of tensors (tied weights), with the first: stored once, found under both."""

    structure: dict[Path, Node] = field(default_factory=dict)
    """How the state is put together, by path, where names do not tell."""

    unions: dict[Path, str] = field(default_factory=dict)
    """Paths of components whose entries may be others on each rank, with their kind."""

    def names(self) -> set[str]:
        return {*self.tensors, *self.values, *self.aliases}


LocalPlans = Mapping[str, LocalPlan]
"""Of one rank, by section."""


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """Ranks that make the same offer."""

    ranks: Sequence[int]
    local_plan: LocalPlan


AllPlans = Mapping[str, Sequence[SharedPlan]]
"""Who offers what, by section."""


def merge_local_plans(local_plans: Sequence[LocalPlans]) -> dict[str, list[SharedPlan]]:
    """The offers of all ranks; alike are those that are one object."""
    all_plans: dict[str, list[SharedPlan]] = {}
    alike: dict[tuple[str, int], list[int]] = {}
    for rank, sections in enumerate(local_plans):
        for section, local_plan in sections.items():
            ranks = alike.setdefault((section, id(local_plan)), [])
            if not ranks:
                all_plans.setdefault(section, []).append(SharedPlan(ranks, local_plan))
            ranks.append(rank)
    return all_plans


NeighborPlans = Mapping[str, Sequence[tuple[Sequence[int], LocalPlan | None]]]
"""What a rank has to know of the others: for some of its sections the ranks that offer the same
names, and what they offer, None standing for what it offers itself."""


def neighbor_plans_of(all_plans: AllPlans, size: int) -> list[NeighborPlans]:
    """The view of each rank. A section that all ranks offer alike is in none."""
    views: list[dict[str, list[tuple[Sequence[int], LocalPlan | None]]]] = [{} for _ in range(size)]
    for section, everyone in all_plans.items():
        if len(everyone) == 1 and len(everyone[0].ranks) == size:
            continue
        sharing: dict[str, list[int]] = {}
        for number, holders in enumerate(everyone):
            for name in holders.local_plan.names():
                sharing.setdefault(name, []).append(number)
        for mine in everyone:
            near = sorted({n for name in mine.local_plan.names() for n in sharing[name]})
            known = [
                (
                    _compact(everyone[n].ranks),
                    None if everyone[n] is mine else everyone[n].local_plan,
                )
                for n in near
            ]
            for rank in mine.ranks:
                views[rank][section] = known
    return list(views)


def known_plans(view: NeighborPlans, mine: LocalPlans, size: int) -> AllPlans:
    """What a rank knows, from its own offers and its view."""
    alike: Sequence[tuple[Sequence[int], LocalPlan | None]] = [(range(size), None)]
    return {
        section: [
            SharedPlan(ranks, other or local_plan) for ranks, other in view.get(section, alike)
        ]
        for section, local_plan in mine.items()
    }


def _compact(ranks: Sequence[int]) -> Sequence[int]:
    apart = max(1, (ranks[-1] - ranks[0]) // max(1, len(ranks) - 1))
    evenly = range(ranks[0], ranks[-1] + 1, apart)
    return evenly if list(evenly) == list(ranks) else ranks


@dataclass(frozen=True, slots=True, eq=False)
class TensorChunks:
    """The chunks that a tensor is written in: rows by dims, and the rank that writes each."""

    name: str
    tensor: LocalTensor
    start: Ints
    stop: Ints
    rank: Ints

    def regions_of(self, rank: int) -> Iterator[Region]:
        """Those that this rank writes."""
        # Thousands of small tensors have one chunk each: numpy is for many at once.
        if len(self.rank) == 1:
            rows = [0] if self.rank.item() == rank else []
        else:
            rows = np.flatnonzero(self.rank == rank).tolist()
        for row in rows:
            yield Region(tuple(self.start[row].tolist()), tuple(self.stop[row].tolist()))


@dataclass(frozen=True, slots=True)
class GlobalPlan:
    """Who writes what."""

    tensors: Sequence[TensorChunks]
    values: Mapping[str, tuple[int, Path]]
    """Rank that writes each value."""

    aliases: Mapping[str, tuple[str, Path]]
    structure: Mapping[Path, Node] | None = None
    """How the state is put together where names do not tell; None where nobody knows."""


def plan(all_plans: AllPlans) -> GlobalPlan:
    """Who writes what, so that every element and every value is written once.

    The same for a rank's own names whether the census is whole, or what the rank knows.

    Raises:
        MismatchError: the ranks do not hold one whole state between them; lists every tensor.
    """
    everyone = [holders for section in sorted(all_plans) for holders in all_plans[section]]
    aliases = {n: alias for h in everyone for n, alias in h.local_plan.aliases.items()}
    wrong = _disagreements(everyone, aliases)
    held: list[tuple[str, LocalTensor, _HeldRegions]] = []
    cells = _RegionFinder()
    for section in sorted(all_plans):
        for name, sharing in _by_name(all_plans[section]).items():
            if name in aliases:
                continue
            tensor = sharing[0].local_plan.tensors[name]
            wrong += _differing(name, sharing)
            found = cells(name, tensor.shape, sharing)
            held.append((name, tensor, found))
            if found.num_elements != prod(tensor.shape) or found.overlap:
                wrong.append(
                    f"`{name}`: the ranks hold {found.num_elements} of {prod(tensor.shape)} "
                    "elements, or some twice"
                )
    if wrong:
        raise MismatchError(
            "the ranks do not hold one whole state:\n  " + "\n  ".join(wrong),
            hint="give rank-specific state a key of its own, such as `rank_3`; shard by DTensor",
        )
    values: dict[str, tuple[int, Path]] = {}
    for holders in everyone:
        for name, path in holders.local_plan.values.items():
            rank = min(holders.ranks[0], values.get(name, (holders.ranks[0],))[0])
            values[name] = rank, path
    structure: dict[Path, Node] = {}
    for holders in everyone:
        # As for values that differ: the first rank's is kept. Optimizers are those of all ranks.
        theirs = holders.local_plan.structure
        both = {
            path: with_optimizers(structure[path], node)
            for path, node in theirs.items()
            if isinstance(node, dict) and OPTIMIZERS in node and path in structure
        }
        structure = {**theirs, **structure, **both}
    return GlobalPlan(list(_placed(held)), values, aliases, structure)


def groups_of(all_plans: AllPlans, mine: LocalPlans, rank: int) -> dict[str, tuple[int, ...]]:
    """For each tensor of this rank that others hold too: the ranks that hold the same elements."""
    known: dict[tuple[object, ...], tuple[int, ...]] = {}
    found: dict[str, tuple[int, ...]] = {}
    for section, local_plan in mine.items():
        everyone = all_plans.get(section, ())
        for name, tensor in local_plan.tensors.items():
            if not prod(tensor.shape):
                continue
            # By identity: tensors that lie alike have one object.
            if tensor.placement is not None:
                key: tuple[object, ...] = (id(tensor.placement),)
                if key not in known:
                    known[key] = _same_place(tensor.placement, rank)
            else:
                holding = [holders for holders in everyone if name in holders.local_plan.tensors]
                key = tuple(map(id, holding))
                if key not in known:
                    known[key] = tuple(sorted(r for holders in holding for r in holders.ranks))
            if len(known[key]) > 1:
                found[name] = known[key]
    return found


def _same_place(placement: MeshPlacement, rank: int) -> tuple[int, ...]:
    """The ranks of a mesh that hold the elements of this one."""
    grid = np.array(placement.mesh.ranks).reshape(placement.mesh.shape)
    at = [
        slice(None) if cut is None else int(where[0])
        for cut, where in zip(placement.shards, np.nonzero(grid == rank), strict=True)
    ]
    return tuple(sorted(np.atleast_1d(grid[tuple(at)]).flatten().tolist()))


def _by_name(everyone: Iterable[SharedPlan]) -> dict[str, list[SharedPlan]]:
    found: dict[str, list[SharedPlan]] = {}
    for holders in everyone:
        for name in holders.local_plan.tensors:
            found.setdefault(name, []).append(holders)
    return found


def _placed(held: Sequence[tuple[str, LocalTensor, _HeldRegions]]) -> Iterator[TensorChunks]:
    """Each tensor with the stretches of its line cut."""
    sizes = [tensor.nbytes for _, tensor, _ in held]
    total: dict[bytes, int] = {}
    for (_, tensor, cells), nbytes in zip(held, sizes, strict=True):
        total[cells.key] = total.get(cells.key, 0) + nbytes * tensor.shared_out
    before = dict.fromkeys(total, 0)
    for (name, tensor, cells), nbytes in zip(held, sizes, strict=True):
        if not tensor.shared_out:
            yield TensorChunks(name, tensor, cells.start, cells.stop, cells.ranks[:, 0])
            continue
        at = before[cells.key]
        before[cells.key] += nbytes
        num_ranks = cells.ranks.shape[1]
        num = max(1, min(num_ranks, total[cells.key] // STRETCH_BYTES_MIN))
        cuts = _cuts(at, nbytes, total[cells.key], num)
        if len(cuts) == 1:
            yield TensorChunks(name, tensor, cells.start, cells.stop, cells.ranks[:, cuts[0][2]])
        else:
            yield _cut(name, tensor, cells, cuts)


def _cuts(before: int, nbytes: int, total: int, num: int) -> list[tuple[int, int, int]]:
    """Bytes of a tensor, from and to, in each stretch of its line, with the stretch's number."""
    if not nbytes:
        return [(0, 0, 0)]
    first, last = before * num // total, (before + nbytes - 1) * num // total
    bounds = [0, *(-(-n * total // num) - before for n in range(first + 1, last + 1)), nbytes]
    return [(bounds[i], bounds[i + 1], first + i) for i in range(len(bounds) - 1)]


def _cut(
    name: str, tensor: LocalTensor, cells: _HeldRegions, cuts: Sequence[tuple[int, int, int]]
) -> TensorChunks:
    rows: list[tuple[list[int], list[int], int]] = []
    for start, stop, ranks in zip(
        cells.start.tolist(), cells.stop.tolist(), cells.ranks.tolist(), strict=True
    ):
        dim = next((d for d, (a, b) in enumerate(zip(start, stop, strict=True)) if b - a > 1), None)
        if dim is None:
            rows.append((start, stop, ranks[cuts[0][2]]))
            continue
        length = stop[dim] - start[dim]
        for lo, hi, number in cuts:
            first, last = lo * length // tensor.nbytes, hi * length // tensor.nbytes
            if first < last:
                from_, to = [*start], [*stop]
                from_[dim], to[dim] = start[dim] + first, start[dim] + last
                rows.append((from_, to, ranks[number]))
    columns = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    return TensorChunks(name, tensor, *columns)


@dataclass(frozen=True, slots=True, eq=False)
class _HeldRegions:
    """The regions that ranks hold of a tensor, a row each; one object for all that lie alike."""

    start: Ints
    stop: Ints
    ranks: Ints
    """Of each region those that hold it; rows repeat themselves to be of one length."""

    num_elements: int
    overlap: bool
    key: bytes
    """The same for tensors whose regions are held by the same ranks."""


class _RegionFinder:
    """Finds the cells of tensors, each way to lie over the ranks once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _HeldRegions] = {}

    def __call__(
        self, name: str, shape: tuple[int, ...], sharing: Sequence[SharedPlan]
    ) -> _HeldRegions:
        placements = [holders.local_plan.tensors[name].placement for holders in sharing]
        # By identity: those that lie alike have one object, and a mesh may have many ranks.
        key = (shape, *map(id, placements), *map(id, sharing))
        if key not in self._known:
            self._known[key] = _cells(shape, placements, sharing)
        return self._known[key]


def _cells(
    shape: tuple[int, ...],
    placements: Sequence[MeshPlacement | None],
    sharing: Sequence[SharedPlan],
) -> _HeldRegions:
    held: dict[Region, list[int]] = {}
    by_spread: dict[int, tuple[MeshPlacement, set[int]]] = {}
    for placement, holders in zip(placements, sharing, strict=True):
        ranks = tuple(holders.ranks)
        whole = placement or MeshPlacement(Mesh((len(ranks),), ranks), (None,))
        by_spread.setdefault(id(whole), (whole, set()))[1].update(ranks)
    merged: dict[MeshPlacement, set[int]] = {}
    for placement_, ranks_ in by_spread.values():
        merged.setdefault(placement_, set()).update(ranks_)
    for placement_, ranks_ in merged.items():
        for region, holding in _regions(shape, placement_):
            held.setdefault(region, []).extend(r for r in holding if r in ranks_)
    regions = sorted((r for r, ranks in held.items() if ranks), key=lambda r: (r.start, r.stop))
    num_ranks = max((len(held[region]) for region in regions), default=1)
    dims = (len(regions), len(shape))
    ranks_of = np.array(
        [np.resize(held[region], num_ranks) for region in regions], np.int64
    ).reshape(len(regions), num_ranks)
    return _HeldRegions(
        np.array([r.start for r in regions], np.int64).reshape(dims),
        np.array([r.stop for r in regions], np.int64).reshape(dims),
        ranks_of,
        sum(region.num_elements for region in regions),
        # The regions of one spread are parts of one whole.
        len(merged) > 1 and first_overlap(regions) is not None,
        repr(dims[0]).encode() + ranks_of.tobytes(),
    )


def _regions(
    shape: tuple[int, ...], placement: MeshPlacement
) -> Iterator[tuple[Region, list[int]]]:
    """Every region that the mesh holds, with its ranks."""
    mesh = placement.mesh
    whole = Region.whole(shape)
    if not whole.num_elements:
        yield whole, list(mesh.ranks)
        return
    split = [axis for axis, cut in enumerate(placement.shards) if cut is not None]
    grid = np.moveaxis(np.array(mesh.ranks).reshape(mesh.shape), split, range(len(split)))
    coordinate = [0] * len(mesh.shape)
    for index in np.ndindex(*grid.shape[: len(split)]):
        for axis, at in zip(split, index, strict=True):
            coordinate[axis] = at
        ranks = grid[index].flatten().tolist()
        for piece in pieces_of(shape, placement.splits_at(coordinate)):
            yield piece.region, ranks


def _differing(name: str, sharing: Sequence[SharedPlan]) -> Iterator[str]:
    """Where a tensor has another dtype or shape than on the first rank that offers it."""
    first = sharing[0].local_plan.tensors[name]
    for holders in sharing[1:]:
        tensor = holders.local_plan.tensors[name]
        if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
            yield (
                f"`{name}` is {tensor.dtype} {list(tensor.shape)} on rank {holders.ranks[0]}, "
                f"{first.dtype} {list(first.shape)} on an earlier one"
            )


def _disagreements(
    everyone: Sequence[SharedPlan], aliases: Mapping[str, tuple[str, Path]]
) -> list[str]:
    """Names that stand for different kinds of things on different ranks."""
    tensors = {name for h in everyone for name in (*h.local_plan.tensors, *h.local_plan.aliases)}
    tied = {n: h.ranks[0] for h in everyone for n in h.local_plan.aliases}
    wrong = []
    for holders in everyone:
        rank = holders.ranks[0]
        for name in holders.local_plan.values:
            if name in tensors:
                wrong.append(f"`{name}` is a tensor on one rank, a value on rank {rank}")
        for name in tied.keys() & holders.local_plan.tensors.keys():
            # A rank without elements has no memory to see by that two tensors are one.
            if _holds_any(holders.local_plan.tensors[name], rank):
                wrong.append(
                    f"`{name}` is tied to `{aliases[name][0]}` on rank {tied[name]}, "
                    f"a tensor of its own on rank {rank}"
                )
    return wrong


def _holds_any(tensor: LocalTensor, rank: int) -> bool:
    if tensor.placement is None:
        return bool(prod(tensor.shape))
    return any(rank in ranks for _, ranks in _regions(tensor.shape, tensor.placement))
