"""Plan a write: merge what all ranks hold, and decide which rank writes each element and value.

Each rank describes what it holds in local plans, one per component. Rank 0 makes the global plan
from all of them. Every other rank makes the part for its own names by the same functions, from the
local plans of its neighbors: the ranks that hold some of the same names. So no global plan is sent.

Elements that several ranks hold are divided between them by bytes: all tensors that the same ranks
hold are put in a row, which is cut into as many equal stretches as there are ranks. A tensor that
a cut goes through is divided at the next row. So each element is written once, all ranks write
about the same number of bytes, and there are hardly more chunks than tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import MismatchError
from holdfast.format.dtypes import nbytes_of
from holdfast.format.manifest import Path
from holdfast.format.region import Region, first_overlap
from holdfast.format.structure import OPTIMIZERS, Node, with_optimizers
from holdfast.state.shard import Mesh, MeshPlacement, pieces_of

Ints = NDArray[np.int64]

STRETCH_BYTES_MIN = 1 << 20
"""Smallest stretch. If the tensors that the same ranks hold are smaller, one rank writes them."""


class LocalTensor(NamedTuple):
    """A tensor that a rank holds."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    placement: MeshPlacement | None = None
    """Mesh placement; None if this rank holds the whole tensor."""

    is_shared: bool = True
    """Whether ranks that hold the same elements each write a part of them. If their versions
    differ, the first rank writes all, so that the checkpoint does not mix versions."""

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """Tensors and values of one component on one rank: all names with the same first key."""

    tensors: dict[str, LocalTensor] = field(default_factory=dict)
    values: dict[str, Path] = field(default_factory=dict)
    aliases: dict[str, tuple[str, Path]] = field(default_factory=dict)
    """Further names of tied tensors, with the first name, under which the tensor is stored."""

    structure: dict[Path, Node] = field(default_factory=dict)
    """Nodes of those dicts and lists that do not follow from the paths of their entries, by
    path."""

    unions: dict[Path, str] = field(default_factory=dict)
    """Kind, such as `model`, of each object whose entries may differ between ranks, by path."""

    def names(self) -> set[str]:
        return {*self.tensors, *self.values, *self.aliases}


LocalPlans = Mapping[str, LocalPlan]
"""Local plans of one rank, keyed by component."""


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """A local plan, and the ranks that have it in common."""

    ranks: Sequence[int]
    local_plan: LocalPlan


AllPlans = Mapping[str, Sequence[SharedPlan]]
"""Distinct local plans of several ranks, keyed by component."""


class TensorChunks(NamedTuple):
    """Chunks in which a tensor is written."""

    name: str
    tensor: LocalTensor
    start: Ints
    """First element of each chunk: one row per chunk, one column per dim."""

    stop: Ints
    rank: Ints
    """Rank that writes each chunk."""

    def regions_of(self, rank: int) -> Iterator[Region]:
        """Yield the chunks that `rank` writes."""
        # numpy is slower for a single chunk, and most tensors have only one.
        if len(self.rank) == 1:
            rows = [0] if self.rank.item() == rank else []
        else:
            rows = np.flatnonzero(self.rank == rank).tolist()
        for row in rows:
            yield Region(tuple(self.start[row].tolist()), tuple(self.stop[row].tolist()))


@dataclass(frozen=True, slots=True)
class GlobalPlan:
    """Chunks and values that each rank writes."""

    tensors: Sequence[TensorChunks]
    values: Mapping[str, tuple[int, Path]]
    """Rank that writes each value, and the value's path."""

    aliases: Mapping[str, tuple[str, Path]]
    structure: Mapping[Path, Node] | None = None
    """Nodes of those dicts and lists that do not follow from the paths of their entries, by path;
    None if they are unknown."""


def plan(all_plans: AllPlans) -> GlobalPlan:
    """Decide which rank writes what, so that each element and each value is written once.

    `all_plans`: local plans of all ranks, or those that `known_plans` returns on one rank. For the
    names of that rank, both give the same result.

    Raises:
        MismatchError: elements are missing or held twice, or ranks disagree. The message lists
            all tensors and values that are wrong.
    """
    plans = [shared for component in sorted(all_plans) for shared in all_plans[component]]
    aliases = {n: alias for s in plans for n, alias in s.local_plan.aliases.items()}
    wrong = _conflicting_kinds(plans, aliases)
    held: list[tuple[str, LocalTensor, _HeldRegions]] = []
    known: dict[tuple[object, ...], _HeldRegions] = {}
    for component in sorted(all_plans):
        by_name = _holders_by_name(all_plans[component], lambda plan: plan.tensors)
        for name, holders in by_name.items():
            if name in aliases:
                continue
            tensor = holders[0].local_plan.tensors[name]
            if len(holders) > 1:
                wrong += _conflicting_shapes(name, holders)
            placements = [shared.local_plan.tensors[name].placement for shared in holders]
            # Compare by identity: equal placements share one object, and comparing large meshes is
            # slow.
            key = (tensor.shape, *map(id, placements), *map(id, holders))
            regions = known.get(key)
            if regions is None:
                regions = known[key] = _held_regions(tensor.shape, placements, holders)
            held.append((name, tensor, regions))
            if not regions.is_whole:
                wrong.append(
                    f"`{name}`: the ranks hold {regions.num_elements} of {prod(tensor.shape)} "
                    "elements, or some twice"
                )
    if wrong:
        raise MismatchError(
            "the ranks do not hold one whole state:\n  " + "\n  ".join(wrong),
            hint="give rank-specific state a key of its own, such as `rank_3`; shard by DTensor",
        )
    values: dict[str, tuple[int, Path]] = {}
    structure: dict[Path, Node] = {}
    for shared in plans:
        first = shared.ranks[0]
        for name, path in shared.local_plan.values.items():
            values[name] = min(first, values.get(name, (first,))[0]), path
        # If nodes differ, the first rank's is stored, with the optimizers of all ranks.
        nodes = shared.local_plan.structure
        merged = {
            path: with_optimizers(structure[path], node)
            for path, node in nodes.items()
            if isinstance(node, dict) and OPTIMIZERS in node and path in structure
        }
        structure = {**nodes, **structure, **merged}
    return GlobalPlan(list(_chunks(held)), values, aliases, structure)


def merge_local_plans(local_plans: Sequence[LocalPlans]) -> dict[str, list[SharedPlan]]:
    """Combine the local plans of all ranks: equal plans become one `SharedPlan`. Plans count as
    equal only if they are one object."""
    all_plans: dict[str, list[SharedPlan]] = {}
    ranks_of: dict[tuple[str, int], list[int]] = {}
    for rank, components in enumerate(local_plans):
        for component, local_plan in components.items():
            ranks = ranks_of.setdefault((component, id(local_plan)), [])
            if not ranks:
                all_plans.setdefault(component, []).append(SharedPlan(ranks, local_plan))
            ranks.append(rank)
    return all_plans


NeighborPlans = Mapping[str, Sequence[tuple[Sequence[int], LocalPlan | None]]]
"""Local plans that one rank needs to plan its own names, keyed by component, each with the ranks
that have it. None stands for the rank's own plan. A component that is equal on all ranks is left
out."""


def neighbor_plans_of(all_plans: AllPlans, size: int) -> list[NeighborPlans]:
    """Return each rank's neighbor plans: those with a name in common with the rank's own plans."""
    neighbors: list[dict[str, list[tuple[Sequence[int], LocalPlan | None]]]]
    neighbors = [{} for _ in range(size)]
    for component, plans in all_plans.items():
        if len(plans) == 1 and len(plans[0].ranks) == size:
            continue
        plans_with: dict[str, list[int]] = {}
        for number, shared in enumerate(plans):
            for name in shared.local_plan.names():
                plans_with.setdefault(name, []).append(number)
        for own in plans:
            numbers = sorted({n for name in own.local_plan.names() for n in plans_with[name]})
            needed = [
                (plans[n].ranks, None if plans[n] is own else plans[n].local_plan) for n in numbers
            ]
            for rank in own.ranks:
                neighbors[rank][component] = needed
    return list(neighbors)


def known_plans(neighbors: NeighborPlans, own: LocalPlans, size: int) -> AllPlans:
    """Combine a rank's neighbor plans with its own plans. Return all local plans of each component
    that the rank has, as far as they are needed to plan its names. `size`: number of ranks."""
    equal: Sequence[tuple[Sequence[int], LocalPlan | None]] = [(range(size), None)]
    return {
        component: [
            SharedPlan(ranks, other or local_plan)
            for ranks, other in neighbors.get(component, equal)
        ]
        for component, local_plan in own.items()
    }


def groups_of(all_plans: AllPlans, own: LocalPlans, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the ranks that hold each value, or the same elements of each tensor, keyed by name.
    Leave out the names that only this rank holds."""
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    groups: dict[str, tuple[int, ...]] = {}
    for component, local_plan in own.items():
        by_name = _holders_by_name(all_plans[component], lambda plan: (*plan.tensors, *plan.values))
        for name in (*local_plan.tensors, *local_plan.values):
            tensor = local_plan.tensors.get(name)
            if tensor is not None and not prod(tensor.shape):
                continue
            placement = None if tensor is None else tensor.placement
            # Compare by identity: equal placements share one object, and so do equal local plans.
            key = (id(placement), *map(id, by_name[name]))
            if key not in known:
                known[key] = _ranks_with(placement, by_name[name], rank)
            if len(known[key]) > 1:
                groups[name] = known[key]
    return groups


def _ranks_with(
    placement: MeshPlacement | None, holders: Sequence[SharedPlan], rank: int
) -> tuple[int, ...]:
    """Return the ranks that hold the same elements of a tensor as `rank`. `holders`: local plans
    that have the tensor."""
    if placement is None:
        return tuple(sorted(holder for shared in holders for holder in shared.ranks))
    grid = np.array(placement.mesh.ranks).reshape(placement.mesh.shape)
    index = [
        slice(None) if shard is None else int(coordinates[0])
        for shard, coordinates in zip(placement.shards, np.nonzero(grid == rank), strict=True)
    ]
    return tuple(sorted(np.atleast_1d(grid[tuple(index)]).flatten().tolist()))


def _holders_by_name(
    plans: Iterable[SharedPlan], names_of: Callable[[LocalPlan], Iterable[str]]
) -> dict[str, list[SharedPlan]]:
    holders: dict[str, list[SharedPlan]] = {}
    for shared in plans:
        for name in names_of(shared.local_plan):
            holders.setdefault(name, []).append(shared)
    return holders


# ----------------------------------------------------------------------- which rank writes a chunk


def _chunks(held: Sequence[tuple[str, LocalTensor, _HeldRegions]]) -> Iterator[TensorChunks]:
    """Yield the chunks of each tensor: the regions that ranks hold, divided between the ranks that
    hold the same region, so that each writes about the same number of bytes."""
    total: dict[bytes, int] = {}
    for _, tensor, regions in held:
        if tensor.is_shared and regions.num_replicas > 1:
            total[regions.key] = total.get(regions.key, 0) + tensor.nbytes
    before = dict.fromkeys(total, 0)
    # Tensors whose chunks have the same writers share one array, so that it is searched once.
    ranks_of: dict[tuple[int, int], Ints] = {}
    for name, tensor, regions in held:
        nbytes, num_replicas = tensor.nbytes, regions.num_replicas
        stretches = [(0, nbytes, 0)]
        if tensor.is_shared and num_replicas > 1:
            offset, row_bytes = before[regions.key], total[regions.key]
            before[regions.key] += nbytes
            num_stretches = max(1, min(num_replicas, row_bytes // STRETCH_BYTES_MIN))
            stretches = _stretches(offset, nbytes, row_bytes, num_stretches)
        if len(stretches) == 1:
            stretch = stretches[0][2]
            key = id(regions), stretch
            if key not in ranks_of:
                ranks_of[key] = regions.ranks[:, stretch]
            yield TensorChunks(name, tensor, regions.start, regions.stop, ranks_of[key])
        else:
            yield _divided(name, tensor, regions, stretches)


def _stretches(before: int, nbytes: int, total: int, num: int) -> list[tuple[int, int, int]]:
    """Divide the bytes of a tensor between ranks. All tensors that the same ranks hold form a row
    of `total` bytes, which is cut into `num` equal stretches, each written by one rank. `before`:
    bytes of the row in front of this tensor. Returns start and stop of each part of the tensor, in
    bytes, and the number of the stretch that contains the part."""
    if not nbytes:
        return [(0, 0, 0)]
    first, last = before * num // total, (before + nbytes - 1) * num // total
    bounds = [0, *(-(-n * total // num) - before for n in range(first + 1, last + 1)), nbytes]
    return [(bounds[i], bounds[i + 1], first + i) for i in range(len(bounds) - 1)]


def _divided(
    name: str,
    tensor: LocalTensor,
    regions: _HeldRegions,
    stretches: Sequence[tuple[int, int, int]],
) -> TensorChunks:
    """Cut the regions of a tensor into chunks, at indices of their first dim longer than 1.
    `stretches`: the parts that `_stretches` returns."""
    rows: list[tuple[list[int], list[int], int]] = []
    for start, stop, ranks in zip(
        regions.start.tolist(), regions.stop.tolist(), regions.ranks.tolist(), strict=True
    ):
        dim = next((d for d, (a, b) in enumerate(zip(start, stop, strict=True)) if b - a > 1), None)
        if dim is None:
            rows.append((start, stop, ranks[stretches[0][2]]))
            continue
        length = stop[dim] - start[dim]
        for first_byte, end_byte, number in stretches:
            first = first_byte * length // tensor.nbytes
            last = end_byte * length // tensor.nbytes
            if first < last:
                chunk_start, chunk_stop = [*start], [*stop]
                chunk_start[dim], chunk_stop[dim] = start[dim] + first, start[dim] + last
                rows.append((chunk_start, chunk_stop, ranks[number]))
    columns = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    return TensorChunks(name, tensor, *columns)


# ------------------------------------------------------------------- which ranks hold which region


@dataclass(frozen=True, slots=True, eq=False)
class _HeldRegions:
    """Regions of a tensor that ranks hold. Each array has one row per region. Tensors with the same
    shape and placement share one object."""

    start: Ints
    stop: Ints
    ranks: Ints
    """Ranks that hold each region. Short rows repeat their ranks, so that all rows are equally
    long."""

    num_replicas: int
    """Length of the rows of `ranks`."""

    num_elements: int
    is_whole: bool
    """Whether the regions have each element of the tensor exactly once."""

    key: bytes
    """Key that is equal for all tensors whose regions are held by the same ranks."""


def _held_regions(
    shape: tuple[int, ...],
    placements: Sequence[MeshPlacement | None],
    holders: Sequence[SharedPlan],
) -> _HeldRegions:
    by_identity: dict[int, tuple[MeshPlacement, set[int]]] = {}
    for placement, shared in zip(placements, holders, strict=True):
        ranks = tuple(shared.ranks)
        known = placement or MeshPlacement(Mesh((len(ranks),), ranks), (None,))
        by_identity.setdefault(id(known), (known, set()))[1].update(ranks)
    merged: dict[MeshPlacement, set[int]] = {}
    for known, rank_set in by_identity.values():
        merged.setdefault(known, set()).update(rank_set)
    held: dict[Region, list[int]] = {}
    for known, rank_set in merged.items():
        for region, mesh_ranks in _mesh_regions(shape, known):
            held.setdefault(region, []).extend(r for r in mesh_ranks if r in rank_set)
    regions = sorted((r for r, ranks in held.items() if ranks), key=lambda r: (r.start, r.stop))
    num_ranks = max((len(held[region]) for region in regions), default=1)
    dims = (len(regions), len(shape))
    ranks_of = np.array(
        [np.resize(held[region], num_ranks) for region in regions], np.int64
    ).reshape(len(regions), num_ranks)
    num_elements = sum(region.num_elements for region in regions)
    # Regions of one placement never overlap.
    overlap = len(merged) > 1 and first_overlap(regions) is not None
    return _HeldRegions(
        start=np.array([r.start for r in regions], np.int64).reshape(dims),
        stop=np.array([r.stop for r in regions], np.int64).reshape(dims),
        ranks=ranks_of,
        num_replicas=num_ranks,
        num_elements=num_elements,
        is_whole=num_elements == prod(shape) and not overlap,
        key=repr(dims[0]).encode() + ranks_of.tobytes(),
    )


def _mesh_regions(
    shape: tuple[int, ...], placement: MeshPlacement
) -> Iterator[tuple[Region, list[int]]]:
    """Yield every region of a tensor that ranks of the mesh hold, with the ranks that hold it."""
    mesh = placement.mesh
    whole = Region.whole(shape)
    if not whole.num_elements:
        yield whole, list(mesh.ranks)
        return
    sharded = [axis for axis, shard in enumerate(placement.shards) if shard is not None]
    grid = np.moveaxis(np.array(mesh.ranks).reshape(mesh.shape), sharded, range(len(sharded)))
    coordinates = [0] * len(mesh.shape)
    for index in np.ndindex(*grid.shape[: len(sharded)]):
        for axis, coordinate in zip(sharded, index, strict=True):
            coordinates[axis] = coordinate
        ranks = grid[index].flatten().tolist()
        for piece in pieces_of(shape, placement.splits_at(coordinates)):
            yield piece.region, ranks


# ------------------------------------------------------------------------------- conflicts of ranks


def _conflicting_shapes(name: str, holders: Sequence[SharedPlan]) -> Iterator[str]:
    """Yield one line per local plan in which tensor `name` has another dtype or shape than in the
    first plan of `holders`."""
    first = holders[0].local_plan.tensors[name]
    for shared in holders[1:]:
        tensor = shared.local_plan.tensors[name]
        if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
            yield (
                f"`{name}` is {tensor.dtype} {list(tensor.shape)} on rank {shared.ranks[0]}, "
                f"{first.dtype} {list(first.shape)} on rank {holders[0].ranks[0]}"
            )


def _conflicting_kinds(
    plans: Sequence[SharedPlan], aliases: Mapping[str, tuple[str, Path]]
) -> list[str]:
    """Return one line per name that is a tensor on one rank, and a value or tied on another."""
    tensors = {name for s in plans for name in (*s.local_plan.tensors, *s.local_plan.aliases)}
    tied = {name: s.ranks[0] for s in plans for name in s.local_plan.aliases}
    wrong = []
    for shared in plans:
        rank = shared.ranks[0]
        for name in shared.local_plan.values:
            if name in tensors:
                wrong.append(f"`{name}` is a tensor on one rank, a value on rank {rank}")
        for name in tied.keys() & shared.local_plan.tensors.keys():
            # If a rank holds no elements of a tensor, it cannot notice that the tensor is tied.
            if _holds_elements(shared.local_plan.tensors[name], rank):
                wrong.append(
                    f"`{name}` is tied to `{aliases[name][0]}` on rank {tied[name]}, "
                    f"a tensor of its own on rank {rank}"
                )
    return wrong


def _holds_elements(tensor: LocalTensor, rank: int) -> bool:
    if tensor.placement is None:
        return bool(prod(tensor.shape))
    return any(rank in ranks for _, ranks in _mesh_regions(tensor.shape, tensor.placement))
