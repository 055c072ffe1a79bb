"""The plan that all ranks follow: agreed once, and kept while nobody's layout changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from holdfast.comm import Ranks, gather_and_run, gather_deduplicated, run_on_all, run_on_rank_0
from holdfast.errors import HoldfastError, UsageError
from holdfast.format.checksum import checksum
from holdfast.format.structure import Node
from holdfast.planning.alike import check_alike
from holdfast.planning.file_layout import FileLayout, TensorItem, lay_out, lay_out_file
from holdfast.planning.index import Index, columns
from holdfast.planning.write_plan import (
    AllPlans,
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
from holdfast.saving.digests import (
    Group,
    Replica,
    Replicas,
    SharedNames,
    ValueDigests,
    shared_names,
)
from holdfast.state.layout import Layout, Layouts, dtype_name, local_of, same_memory
from holdfast.state.tree import FlatState, Leaf, Path
from holdfast.state.values import Containers


class KnownTensor(NamedTuple):
    """How a tensor was found, and what is offered of it."""

    layout: Layout
    local_plan: LocalTensor
    dtype: torch.dtype | None
    """That was asked for."""

    def stands(self, leaf: Leaf, local: torch.Tensor, dtype: torch.dtype | None) -> bool:
        """Whether there is nothing new to be found out."""
        layout, local_plan, before = self
        return dtype is before and layout.is_of(leaf.value, local) and local_plan.path == leaf.path


@dataclass(frozen=True, slots=True, eq=False)
class LocalState:
    """What this rank holds."""

    tensors: dict[str, torch.Tensor]
    """Their elements on this rank."""

    seen: dict[str, KnownTensor]
    values: list[tuple[Mapping[str, Path], Any]]
    """Each with all its names."""

    aliases: dict[str, tuple[str, Path]]
    """Second names of tensors, with the first."""

    local_plans: dict[str, LocalPlan]
    """By section."""

    stepped: Callable[[], frozenset[str]]
    """Names of the tensors that change in a step of an optimizer only."""


class Planner:
    """Who writes what, agreed between the ranks once and kept while nobody's layout changes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._layouts = Layouts()
        self._last = _Previous({}, [], {}, {}, {}, {})
        self._containers = Containers()
        self._offers: LocalPlans | None = None
        self._items: tuple[TensorItem, ...] = ()
        self._values: frozenset[str] = frozenset()
        self._by_first: frozenset[str] = frozenset()
        self._replicas: tuple[Replica, ...] = ()
        self._near: AllPlans = {}
        self._shared: dict[str, list[SharedNames]] = {}
        self._shared_for: object = None
        self._warned_of: frozenset[str] = frozenset()
        self.stepped: frozenset[str] = frozenset()
        """Names of the tensors that change in a step of an optimizer only, once there is a plan."""

        self.index: Index | None = None
        """On rank 0, once there is a plan."""

    @torch.no_grad()
    def hold(self, state: FlatState, dtype: torch.dtype | None) -> LocalState:
        """What this rank has to offer; floating-point tensors as `dtype`, where one is given."""
        before, known = self._last, self._last.seen
        leaves = state.leaves
        tensors: dict[str, torch.Tensor] = {}
        seen: dict[str, KnownTensor] = {}
        values: list[tuple[Mapping[str, Path], Any]] = []
        aliases: dict[str, tuple[str, Path]] = {}
        first_at: dict[int, str] = {}
        beside: dict[int, list[str]] = {}
        for name, leaf in leaves.items():
            value = leaf.value
            if not isinstance(value, torch.Tensor):
                values.append((leaf.names or {name: leaf.path}, value))
                continue
            local = tensors[name] = local_of(value)
            one = known.get(name)
            if one is None or not one.stands(leaf, local, dtype):
                one = self._see(name, leaf, local, dtype)
            seen[name] = one
            at = local.data_ptr()
            first = first_at.setdefault(at, name)
            if first is not name and local.numel():
                # Few begin where another does: only of these more is looked at.
                others = beside.setdefault(at, [first])
                tied = [other for other in others if same_memory(value, leaves[other].value)]
                if tied:
                    aliases[name] = (tied[0], leaf.path)
                else:
                    others.append(name)
        names = [names for names, _ in values]
        same = (seen, names, aliases) == (known, before.names, before.aliases)
        same = same and (state.structure, state.unions) == (before.structure, before.unions)
        local_plans = before.local_plans if same else _offers_of(seen, aliases, names, state)
        self._last = _Previous(seen, names, aliases, state.structure, state.unions, local_plans)
        return LocalState(tensors, seen, values, aliases, local_plans, state.stepped)

    def _see(
        self, name: str, leaf: Leaf, local: torch.Tensor, dtype: torch.dtype | None
    ) -> KnownTensor:
        layout = self._layouts.of(name, leaf.value, local)
        stored_as = layout.dtype
        if dtype is not None and local.is_floating_point():
            stored_as = dtype_name(dtype)
        shared_out = name not in self._by_first
        local_plan = LocalTensor(stored_as, layout.shape, leaf.path, layout.placement, shared_out)
        return KnownTensor(layout, local_plan, dtype)

    def replicas(self, held: LocalState, *, stepped: bool) -> Replicas:
        """What this rank holds and others do too: of it what only optimizers change, or the
        rest."""
        mine = [one for one in self._replicas if (one.name in self.stepped) is stepped]
        return Replicas(mine, {one.name: held.tensors[one.name].detach() for one in mine})

    def value_digests(self, held: LocalState) -> ValueDigests:
        """Digests of the values that other ranks hold too, but for those whose difference is
        known.

        Raises:
            UsageError: a value that cannot be kept.
        """
        if self._shared_for is not held.local_plans:
            self._find_shared(held)
        shared, container_of = self._shared, self._containers.of
        if not shared:
            return ValueDigests(())
        return ValueDigests(
            (shared[first], checksum(container_of(first, value)))
            for first, value in ((next(iter(names)), value) for names, value in held.values)
            if first in shared
        )

    def _find_shared(self, held: LocalState) -> None:
        """Find out which ranks hold each value: once, for as long as nothing changes but values."""
        groups: dict[str, Group] = {}
        for everyone in self._near.values() if self._ranks.size > 1 else ():
            known: dict[tuple[int, ...], Group] = {}
            for name in {name for holders in everyone for name in holders.local_plan.values}:
                holding = [one for one in everyone if name in one.local_plan.values]
                key = tuple(map(id, holding))
                if key not in known:
                    known[key] = tuple(sorted(r for holders in holding for r in holders.ranks))
                groups[name] = known[key]
        self._shared = {}
        for names, _ in held.values if groups else ():
            compared = [name for name in names if name not in self._warned_of]
            found = shared_names(compared, lambda name: groups[name])
            if found:
                self._shared[next(iter(names))] = found
        self._shared_for = held.local_plans

    def warned_of(self, names: Collection[str]) -> None:
        """Compare these values no more: that they differ has been said. Every rank calls this
        alike."""
        self._warned_of |= frozenset(names)
        self._shared_for = None

    def keep_first(self, names: Collection[str]) -> None:
        """From the next `hold` on, have each of these tensors written by the first rank that holds
        it: the ranks' versions differ. Every rank calls this alike."""
        self._by_first |= frozenset(names)
        seen = {name: one for name, one in self._last.seen.items() if name not in self._by_first}
        self._last = self._last._replace(seen=seen)

    def agree(self, held: LocalState | HoldfastError) -> None:
        """Make sure that there is a plan for what the ranks hold; a rank that could not find out
        passes its error.

        Collective: every rank calls this. While no layout changes that is all that they tell.
        """
        ranks = self._ranks
        error = held if isinstance(held, HoldfastError) else None
        changed = isinstance(held, LocalState) and held.local_plans != self._offers
        anyone_failed, anyone_changed = ranks.all_reduce_max([error is not None, changed])
        if anyone_failed:
            gather_and_run(ranks, error, lambda _: None)
        if anyone_changed:
            assert isinstance(held, LocalState)
            # Forgotten until all have agreed: a failed plan must not be taken for the next one.
            self._offers = None
            self._renew(held)
            self._offers = held.local_plans

    def file_layout(self, held: LocalState) -> FileLayout:
        """This rank's file, as it is to be written."""
        num_held = sum(len(local_plan.values) for local_plan in held.local_plans.values())
        all_mine = len(self._values) == num_held
        containers = []
        for names, value in held.values:
            mine = [*names] if all_mine else [name for name in names if name in self._values]
            if mine:
                containers.append((mine, self._containers.of(mine[0], value)))
        return lay_out_file(self._ranks.rank, self._items, containers)

    def _renew(self, held: LocalState) -> None:
        ranks = self._ranks
        local_plans = gather_deduplicated(ranks, held.local_plans)
        whole: list[GlobalPlan] = []
        views: list[NeighborPlans] = []

        def consider() -> None:
            all_plans = merge_local_plans(local_plans)
            check_alike(all_plans, ranks.size)
            whole.append(plan(all_plans))
            views.extend(neighbor_plans_of(all_plans, ranks.size))

        run_on_rank_0(ranks, consider)
        view = ranks.scatter(views)
        near = known_plans(view, held.local_plans, ranks.size)
        mine = run_on_all(ranks, lambda: whole[0] if whole else plan(near))
        groups = groups_of(near, held.local_plans, ranks.rank) if ranks.size > 1 else {}
        self._near, self._shared_for = near, None
        self._replicas = tuple(
            Replica(name, group) for name, group in groups.items() if name not in self._by_first
        )
        self.stepped = held.stepped()
        self._values = frozenset(n for n, (rank, _) in mine.values.items() if rank == ranks.rank)
        regions = [
            (placed.name, placed.tensor.dtype, region)
            for placed in mine.tensors
            for region in placed.regions_of(ranks.rank)
        ]
        self._items = run_on_all(ranks, lambda: lay_out(regions))
        every = gather_deduplicated(ranks, {"items": columns(self._items)})
        if ranks.rank == 0:
            self.index = Index(whole[0], [theirs["items"] for theirs in every])


class _Previous(NamedTuple):
    """What was held last, without any of it."""

    seen: Mapping[str, KnownTensor]
    names: Sequence[Mapping[str, Path]]
    aliases: Mapping[str, tuple[str, Path]]
    structure: Mapping[Path, Node]
    unions: Mapping[Path, str]
    local_plans: dict[str, LocalPlan]


def _offers_of(
    seen: Mapping[str, KnownTensor],
    aliases: Mapping[str, tuple[str, Path]],
    values: Iterable[Mapping[str, Path]],
    state: FlatState,
) -> dict[str, LocalPlan]:
    local_plans: dict[str, LocalPlan] = {}

    def section(name: str) -> LocalPlan:
        _check_text(name)
        head, dot, _ = name.partition(".")
        return local_plans.setdefault(head if dot else "", LocalPlan())

    for name, one in seen.items():
        if name in aliases:
            section(name).aliases[name] = aliases[name]
        else:
            section(name).tensors[name] = one.local_plan
    for names in values:
        section(next(iter(names))).values.update(names)
    for path, node in state.structure.items():
        section(".".join(map(str, path))).structure[path] = node
    for path, kind in state.unions.items():
        # In the section of what lies below it.
        section(f"{'.'.join(map(str, path))}.").unions[path] = kind
    return local_plans


def _check_text(name: str) -> None:
    """Raises UsageError where an index could not hold a name."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the name {name!r} holds half of a character: {error.reason}",
            hint="such text comes from file names that are no UTF-8: rename the key",
        ) from error
