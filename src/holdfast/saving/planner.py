"""Plan a save: describe what each rank holds, and agree on which rank writes what."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from holdfast.comm import Ranks, gather_and_run, gather_deduplicated, run_on_all, run_on_rank_0
from holdfast.errors import HoldfastError, UsageError
from holdfast.format.checksum import checksum
from holdfast.format.region import Region
from holdfast.format.structure import Node
from holdfast.planning.alike import check_alike
from holdfast.planning.file_layout import FileLayout, TensorItem, lay_out, lay_out_file
from holdfast.planning.host_file import FilePart, place_parts, place_tensors, size_of
from holdfast.planning.index import Index, columns
from holdfast.planning.write_plan import (
    GlobalPlan,
    LocalPlan,
    LocalPlans,
    LocalTensor,
    NeighborPlans,
    groups_of,
    known_plans,
    merge_local_plans,
    neighbor_plans_of,
    plan,
)
from holdfast.saving.digests import Digests, Replicas, SharedNames, digests_of, shared_names
from holdfast.saving.stage import ChangeCheck
from holdfast.state.layout import Layout, Layouts, box_of, dtype_name, local_of, same_memory
from holdfast.state.tree import FlatState, Leaf, Path, dotted
from holdfast.state.values import Containers


@dataclass(frozen=True, slots=True, eq=False)
class LocalState:
    """State that this rank holds."""

    tensors: dict[str, torch.Tensor]
    """Local elements of each tensor."""

    known: dict[str, KnownTensor]
    """Layout and description of each tensor."""

    values: list[tuple[Mapping[str, Path], Any]]
    """Each value, with the path of each of its names."""

    local_plans: dict[str, LocalPlan]
    """Local plan of each component."""

    dtensors: dict[str, torch.Tensor]
    """DTensors whose local elements are among `tensors`, by name."""

    state: FlatState
    """State that is described."""

    def training_tensor(self, item: TensorItem) -> torch.Tensor:
        """Return the elements of the item's region, as a view of this rank's training tensor."""
        name, region = item.name, item.region
        tensor, (layout, _) = self.tensors[name], self.known[name]
        if tensor.requires_grad:
            tensor = tensor.detach()
        # Most tensors are written as a whole by the rank that holds them.
        own = layout.pieces[0].region
        if len(layout.pieces) == 1 and own.stop == region.stop and own.start == region.start:
            return tensor
        piece = next(p for p in layout.pieces if p.region & region == region)
        return box_of(tensor, piece.local_of(region))

    def change_check(self, names: Collection[str]) -> ChangeCheck:
        """Return a check that these tensors do not change from now on."""
        return ChangeCheck(names, self.tensors, self.dtensors)


KnownTensor = tuple[Layout, LocalTensor]
"""Layout and description of a tensor, reused by later saves while its layout stays the same."""


_REQUIRES_GRAD = attrgetter("value.requires_grad")


class Planner:
    """Makes the plan that all ranks agree on, and reuses it in later saves while no rank's layout
    changes."""

    def __init__(self, ranks: Ranks, hosts: Sequence[str] | None = None) -> None:
        """`hosts`: host of each rank, if the ranks of a host write one file together; else None."""
        self.ranks = ranks
        self._hosts = hosts
        self._layouts = Layouts()
        self._previous = _Previous(None, {}, [], {}, {}, {}, {})
        self._containers = Containers()
        self._agreed: LocalPlans | None = None
        """Local plans that the current plan was made from."""

        self._groups: Mapping[str, Sequence[int]] = {}
        """Ranks that hold each tensor and value, without those that only this rank holds."""

        self._shared: dict[str, list[SharedNames]] = {}
        """Names among `_groups` whose replicas are still compared."""

        self._shared_of: object = None
        """Local plans that `_shared` was made from."""

        self._different: frozenset[str] = frozenset()
        """Names of tensors and values that differ between ranks. The first rank that holds
        such a tensor or value writes it."""

        self._items: tuple[TensorItem, ...] = ()
        self._values: frozenset[str] = frozenset()
        """Names of the values that this rank writes."""

        self.stepped: frozenset[str] = frozenset()
        """Names of the tensors that change only when an optimizer steps. Set by `agree`, equal on
        all ranks that hold a tensor."""

        self._trainable: dict[str, bool] = {}
        """Whether each tensor requires gradients, by name. Optimizer state, which does not, is left
        out to save time."""

        self.index: Index | None = None
        """Index of the checkpoint, on rank 0. Set by `agree`."""

    @torch.no_grad()
    def hold(self, state: FlatState, dtype: torch.dtype | None) -> LocalState:
        """Describe the state that this rank holds. `dtype`: dtype in which floating-point tensors
        are stored; None for their own."""
        previous, leaves = self._previous, state.leaves
        reusable = previous.known if previous.dtype is dtype else {}
        tensors: dict[str, torch.Tensor] = {}
        dtensors: dict[str, torch.Tensor] = {}
        known: dict[str, KnownTensor] = {}
        values: list[tuple[Mapping[str, Path], Any]] = []
        aliases: dict[str, tuple[str, Path]] = {}
        first_at: dict[int, str] = {}
        untied_at: dict[int, list[str]] = {}
        for name, leaf in leaves.items():
            path, value = leaf.path, leaf.value
            if not isinstance(value, torch.Tensor):
                values.append((leaf.names or {name: path}, value))
                continue
            local = tensors[name] = local_of(value)
            if local is not value:
                dtensors[name] = value
            found = reusable.get(name)
            if found is None or not found[0].is_of(value, local) or found[1].path != path:
                found = self._describe(name, leaf, local, dtype)
            known[name] = found
            address = local.data_ptr()
            first = first_at.setdefault(address, name)
            if first is not name and local.numel():
                # Few tensors share an address, so only these are compared in full.
                others = untied_at.setdefault(address, [first])
                tied = [other for other in others if same_memory(value, leaves[other].value)]
                if tied:
                    aliases[name] = (tied[0], path)
                else:
                    others.append(name)
        names = [names for names, _ in values]
        local_plans = previous.local_plans
        current = _Previous(
            dtype, known, names, aliases, state.structure, state.unions, local_plans
        )
        if current != previous:
            local_plans = _local_plans(known, aliases, names, state)
            current = current._replace(local_plans=local_plans)
        self._previous = current
        return LocalState(tensors, known, values, local_plans, dtensors, state)

    def _describe(
        self, name: str, leaf: Leaf, local: torch.Tensor, dtype: torch.dtype | None
    ) -> KnownTensor:
        layout = self._layouts.of(name, leaf.value, local)
        stored_as = layout.dtype
        if dtype is not None and local.is_floating_point():
            stored_as = dtype_name(dtype)
        tensor = LocalTensor(
            stored_as,
            layout.shape,
            leaf.path,
            placement=layout.placement,
            is_shared=name not in self._different,
        )
        return layout, tensor

    def agree(self, held: LocalState | HoldfastError) -> LocalState:
        """Make a plan, unless the plan of the previous save still holds on all ranks. Returns
        `held`, the state of this rank.

        Collective: every rank calls this. A rank that failed to describe its state passes its
        error, and every rank raises. While no layout changes, this costs one `all_reduce_max`.
        """
        ranks = self.ranks
        error = held if isinstance(held, HoldfastError) else None
        changed = isinstance(held, LocalState) and not self._fits(held)
        anyone_failed, anyone_changed = ranks.all_reduce_max([error is not None, changed])
        if anyone_failed:
            gather_and_run(ranks, error, lambda _: None)
        assert isinstance(held, LocalState)
        if anyone_changed:
            # None until all ranks have agreed: the next save must not use a failed plan.
            self._agreed = None
            self._plan(held)
            self._agreed = held.local_plans
        return held

    def _fits(self, held: LocalState) -> bool:
        """Return whether the current plan fits the state of this rank. It no longer does if a
        parameter was frozen, because `stepped` must not contain it any more."""
        if held.local_plans != self._agreed:
            return False
        leaves = map(held.state.leaves.__getitem__, self._trainable)
        return [*map(_REQUIRES_GRAD, leaves)] == [*self._trainable.values()]

    def _plan(self, held: LocalState) -> None:
        """Make the plan. Rank 0 plans for all ranks; any other rank plans only the tensors and
        values that it has. Collective."""
        ranks = self.ranks
        gathered = gather_deduplicated(ranks, held.local_plans)
        global_plans: list[GlobalPlan] = []
        neighbor_plans: list[NeighborPlans] = []

        def plan_for_all() -> None:
            all_plans = merge_local_plans(gathered)
            check_alike(all_plans, ranks.size)
            global_plans.append(plan(all_plans))
            neighbor_plans.extend(neighbor_plans_of(all_plans, ranks.size))

        run_on_rank_0(ranks, plan_for_all)
        neighbors = known_plans(ranks.scatter(neighbor_plans), held.local_plans, ranks.size)
        write_plan = run_on_all(ranks, lambda: global_plans[0] if global_plans else plan(neighbors))
        self._groups = groups_of(neighbors, held.local_plans, ranks.rank) if ranks.size > 1 else {}
        self._shared_of = None
        self._values = frozenset(
            name for name, (rank, _) in write_plan.values.items() if rank == ranks.rank
        )
        regions = [*_regions_of(ranks.rank, write_plan)]
        self._items, stepped = run_on_all(ranks, lambda: (lay_out(regions), held.state.stepped()))
        others = sorted(n for n in self._groups if n in held.tensors and n not in stepped)
        sent: dict[str, Any] = {"items": columns(self._items), "others": others}
        layouts = gather_deduplicated(ranks, sent)
        self._set_stepped(held, stepped, [layout["others"] for layout in layouts])
        places = None
        if self._hosts is not None:
            sizes = ranks.gather(size_of(lay_out_file(ranks.rank, self._items, [])))
            places = place_tensors(self._hosts, sizes) if sizes else None
        if ranks.rank == 0:
            columns_of = [layout["items"] for layout in layouts]
            self.index = Index(global_plans[0], columns_of, places=places)

    def _set_stepped(
        self, held: LocalState, stepped: frozenset[str], others: Sequence[Sequence[str]]
    ) -> None:
        """Set `stepped` to those names in `stepped` that are in no list of `others`. All ranks must
        agree, because they compare shared tensors before or after they write them, depending on
        `stepped`. `others`: on rank 0, the shared tensors of each rank that are not in its
        `stepped`. Collective."""
        distinct = {id(names): names for names in others}
        self.stepped = stepped.difference(*self.ranks.broadcast([*distinct.values()]))
        trainable = {n: held.state.leaves[n].value.requires_grad for n in held.tensors}
        self._trainable = {n: yes for n, yes in trainable.items() if yes or n not in self.stepped}

    def file_layout(self, held: LocalState) -> FileLayout:
        """Lay out the file that this rank writes."""
        num_held = sum(len(local_plan.values) for local_plan in held.local_plans.values())
        writes_all = len(self._values) == num_held
        containers = []
        for names, value in held.values:
            written = [*names] if writes_all else [name for name in names if name in self._values]
            if written:
                containers.append((written, self._containers.of(written[0], value)))
        return lay_out_file(self.ranks.rank, self._items, containers)

    def host_part(self, layout: FileLayout) -> FilePart | None:
        """Return this rank's part of the file of its host; None if it writes a file of its own.
        Collective."""
        if self._hosts is None:
            return None
        sizes = self.ranks.gather(size_of(layout))
        return self.ranks.scatter(place_parts(self._hosts, sizes) if sizes else [])

    def replicas(self, held: LocalState) -> Replicas:
        """Return the tensors that other ranks hold too and that only optimizer steps change."""
        shared = self._shared_by_name(held)
        names = [name for name in shared if name in self.stepped]
        return Replicas({name: held.tensors[name].detach() for name in names}, shared)

    def digests(self, held: LocalState) -> Digests:
        """Compute digests of all values and tensors that other ranks hold too, except those tensors
        that `replicas` returns.

        Raises:
            UsageError: a value cannot be saved.
        """
        shared = self._shared_by_name(held)
        names = [name for name in shared if name in held.tensors and name not in self.stepped]
        digests = digests_of({name: held.tensors[name].detach() for name in names})
        for names_of_value, value in held.values if shared else ():
            first = next(iter(names_of_value))
            if first in shared:
                digests[first] = checksum(self._containers.of(first, value))
        return Digests((shared[name], digest) for name, digest in digests.items())

    def _shared_by_name(self, held: LocalState) -> dict[str, list[SharedNames]]:
        if self._shared_of is not held.local_plans:
            groups = {n: group for n, group in self._groups.items() if n not in self._different}
            entries = chain(([name] for name in held.tensors), (names for names, _ in held.values))
            self._shared = shared_names(entries, groups) if groups else {}
            self._shared_of = held.local_plans
        return self._shared

    def keep_first(self, names: Collection[str]) -> None:
        """Stop comparing these tensors and values, whose replicas differ. From the next `hold` on,
        the first rank that holds such a tensor or value writes all of it. Every rank must call this
        with the same names."""
        self._different |= frozenset(names)
        self._shared_of = None
        known = {n: one for n, one in self._previous.known.items() if n not in self._different}
        self._previous = self._previous._replace(known=known)


class _Previous(NamedTuple):
    """Description of the state in the last call of `hold`, without its tensors and values."""

    dtype: torch.dtype | None
    """Requested dtype; None for the tensors' own."""

    known: Mapping[str, KnownTensor]
    names: Sequence[Mapping[str, Path]]
    aliases: Mapping[str, tuple[str, Path]]
    structure: Mapping[Path, Node]
    unions: Mapping[Path, str]
    local_plans: dict[str, LocalPlan]


def _regions_of(rank: int, write_plan: GlobalPlan) -> Iterator[tuple[str, str, Region]]:
    """Yield the name, dtype and region of each chunk that a rank writes."""
    # Tensors of one layout share their arrays, which have a row per rank. Search each array once.
    known: dict[tuple[int, int, int], list[Region]] = {}
    for chunks in write_plan.tensors:
        key = id(chunks.start), id(chunks.stop), id(chunks.rank)
        if key not in known:
            known[key] = [*chunks.regions_of(rank)]
        for region in known[key]:
            yield chunks.name, chunks.tensor.dtype, region


def _local_plans(
    known: Mapping[str, KnownTensor],
    aliases: Mapping[str, tuple[str, Path]],
    values: Sequence[Mapping[str, Path]],
    state: FlatState,
) -> dict[str, LocalPlan]:
    """Make the local plan of each component."""
    local_plans: dict[str, LocalPlan] = {}

    def plan_of(name: str) -> LocalPlan:
        component, dot, _ = name.partition(".")
        component = component if dot else ""
        local_plan = local_plans.get(component)
        if local_plan is None:
            local_plan = local_plans[component] = LocalPlan()
        return local_plan

    names_of_values = [name for names in values for name in names]
    paths_of_nodes = [dotted(path) for path in (*state.structure, *state.unions)]
    _check_text([*known, *names_of_values, *paths_of_nodes])
    for name, (_, tensor) in known.items():
        if name in aliases:
            plan_of(name).aliases[name] = aliases[name]
        else:
            plan_of(name).tensors[name] = tensor
    for names in values:
        plan_of(next(iter(names))).values.update(names)
    for path, node in state.structure.items():
        plan_of(dotted(path)).structure[path] = node
    for path, kind in state.unions.items():
        # `plan_of` takes the keys before the first dot as the component. The dot at the end lets it
        # return the plan of the entries below the path, even if the path has a single key.
        plan_of(f"{dotted(path)}.").unions[path] = kind
    return local_plans


def _check_text(names: Sequence[str]) -> None:
    """Raise UsageError if an index could not store one of the names."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        name = next(name for name in names if name.encode(errors="replace").decode() != name)
        raise UsageError(
            f"the name {name!r} holds half of a character: {error.reason}",
            hint="such text comes from file names that are not UTF-8: rename the key",
        ) from None
