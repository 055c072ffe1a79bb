"""The plan that all ranks follow: agreed once, and kept while nobody's layout changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from holdfast.comm import Ranks, conclude, gather_distinct, on_every_rank, on_rank_0
from holdfast.errors import HoldfastError, UsageError
from holdfast.format.checksum import checksum
from holdfast.format.structure import Node
from holdfast.planning.file_layout import FileImage, TensorItem, image_of, lay_out
from holdfast.planning.index import Index, columns
from holdfast.planning.write_plan import (
    Offer,
    Offers,
    Plan,
    TensorOffer,
    View,
    census_from,
    census_of,
    differing,
    groups_of,
    plan,
    views_of,
)
from holdfast.saving.digests import Replica, Replicas
from holdfast.state.layout import Layout, Layouts, dtype_name, local_of, same_memory
from holdfast.state.tree import FlatState, Leaf, Path
from holdfast.state.values import Containers

logger = logging.getLogger("holdfast")


class Seen(NamedTuple):
    """How a tensor was found, and what is offered of it."""

    layout: Layout
    offer: TensorOffer
    dtype: torch.dtype | None
    """That was asked for."""

    def stands(self, leaf: Leaf, local: torch.Tensor, dtype: torch.dtype | None) -> bool:
        """Whether there is nothing new to be found out."""
        layout, offer, before = self
        return dtype is before and layout.is_of(leaf.value, local) and offer.path == leaf.path


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What this rank holds."""

    tensors: dict[str, torch.Tensor]
    """Their elements on this rank."""

    seen: dict[str, Seen]
    values: list[tuple[Mapping[str, Path], Any]]
    """Each with all its names."""

    aliases: dict[str, tuple[str, Path]]
    """Second names of tensors, with the first."""

    offers: dict[str, Offer]
    """By section."""

    stepped: Callable[[], frozenset[str]]
    """Names of the tensors that change in a step of an optimizer only."""


class Planner:
    """Who writes what, agreed between the ranks once and kept while nobody's layout changes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._layouts = Layouts()
        self._last = _Last({}, [], {}, {}, {})
        self._containers = Containers()
        self._offers: Offers | None = None
        self._items: tuple[TensorItem, ...] = ()
        self._values: frozenset[str] = frozenset()
        self._by_first: frozenset[str] = frozenset()
        self._replicas: tuple[Replica, ...] = ()
        self.stepped: frozenset[str] = frozenset()
        """Names of the tensors that change in a step of an optimizer only, once there is a plan."""

        self.index: Index | None = None
        """On rank 0, once there is a plan."""

    @torch.no_grad()
    def hold(self, state: FlatState, dtype: torch.dtype | None) -> Held:
        """What this rank has to offer; floating-point tensors as `dtype`, where one is given."""
        before, known = self._last, self._last.seen
        leaves = state.leaves
        tensors: dict[str, torch.Tensor] = {}
        seen: dict[str, Seen] = {}
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
        same = same and state.structure == before.structure
        offers = before.offers if same else _offers_of(seen, aliases, names, state.structure)
        self._last = _Last(seen, names, aliases, state.structure, offers)
        return Held(tensors, seen, values, aliases, offers, state.stepped)

    def _see(self, name: str, leaf: Leaf, local: torch.Tensor, dtype: torch.dtype | None) -> Seen:
        layout = self._layouts.of(name, leaf.value, local)
        stored_as = layout.dtype
        if dtype is not None and local.is_floating_point():
            stored_as = dtype_name(dtype)
        shared_out = name not in self._by_first
        offer = TensorOffer(stored_as, layout.shape, leaf.path, layout.spread, shared_out)
        return Seen(layout, offer, dtype)

    def replicas(self, held: Held, *, stepped: bool) -> Replicas:
        """What this rank holds and others do too: of it what only optimizers change, or the
        rest."""
        mine = [one for one in self._replicas if (one.name in self.stepped) is stepped]
        return Replicas(mine, {one.name: held.tensors[one.name].detach() for one in mine})

    def keep_first(self, names: Collection[str]) -> None:
        """From the next `hold` on, have each of these tensors written by the first rank that holds
        it: the ranks' versions differ. Every rank calls this alike."""
        self._by_first |= frozenset(names)
        seen = {name: one for name, one in self._last.seen.items() if name not in self._by_first}
        self._last = self._last._replace(seen=seen)

    def agree(self, held: Held | HoldfastError) -> None:
        """Make sure that there is a plan for what the ranks hold; a rank that could not find out
        passes its error.

        Collective: every rank calls this. While no layout changes that is all that they tell.
        """
        ranks = self._ranks
        error = held if isinstance(held, HoldfastError) else None
        changed = isinstance(held, Held) and held.offers != self._offers
        anyone_failed, anyone_changed = ranks.largest([error is not None, changed])
        if anyone_failed:
            conclude(ranks, error, lambda _: None)
        if anyone_changed:
            assert isinstance(held, Held)
            # Forgotten until all have agreed: a failed plan must not be taken for the next one.
            self._offers = None
            self._renew(held)
            self._offers = held.offers

    def image(self, held: Held) -> FileImage:
        """This rank's file, as it is to be written."""
        num_held = sum(len(offer.values) for offer in held.offers.values())
        all_mine = len(self._values) == num_held
        containers = []
        for names, value in held.values:
            mine = [*names] if all_mine else [name for name in names if name in self._values]
            if mine:
                containers.append((mine, self._containers.of(mine[0], value)))
        return image_of(self._ranks.rank, self._items, containers)

    def _renew(self, held: Held) -> None:
        ranks = self._ranks
        offers = gather_distinct(ranks, held.offers)
        whole: list[Plan] = []
        views: list[View] = []

        def consider() -> None:
            census = census_of(offers)
            whole.append(plan(census))
            views.extend(views_of(census, ranks.size))

        on_rank_0(ranks, consider)
        view = ranks.scatter(views)
        near = census_from(view, held.offers, ranks.size)
        mine = on_every_rank(ranks, lambda: whole[0] if whole else plan(near))
        groups = groups_of(near, held.offers, ranks.rank) if ranks.size > 1 else {}
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
        self._items = on_every_rank(ranks, lambda: lay_out(regions))
        digests = self._digests(held, view)
        told: dict[str, Any] = {"items": columns(self._items), "values": digests}
        every = gather_distinct(ranks, told)
        if ranks.rank == 0:
            self.index = Index(whole[0], [theirs["items"] for theirs in every])
            # What many ranks have alike is one object.
            once = {id(theirs["values"]): theirs["values"] for theirs in every}
            _warn_of_differences([*once.values()])

    def _digests(self, held: Held, view: View) -> dict[str, int]:
        """Of each value that other ranks have too."""
        shared = {
            name
            for section, offer in held.offers.items()
            for name in offer.values
            if len(view.get(section, ())) != 1 or len(view[section][0][0]) > 1
        }
        return {
            name: checksum(self._containers.of(name, value))
            for names, value in held.values
            for name in names
            if name in shared
        }


class _Last(NamedTuple):
    """What was held last, without any of it."""

    seen: Mapping[str, Seen]
    names: Sequence[Mapping[str, Path]]
    aliases: Mapping[str, tuple[str, Path]]
    structure: Mapping[Path, Node]
    offers: dict[str, Offer]


def _offers_of(
    seen: Mapping[str, Seen],
    aliases: Mapping[str, tuple[str, Path]],
    values: Iterable[Mapping[str, Path]],
    structure: Mapping[Path, Node],
) -> dict[str, Offer]:
    offers: dict[str, Offer] = {}

    def section(name: str) -> Offer:
        _check_text(name)
        head, dot, _ = name.partition(".")
        return offers.setdefault(head if dot else "", Offer())

    for name, one in seen.items():
        if name in aliases:
            section(name).aliases[name] = aliases[name]
        else:
            section(name).tensors[name] = one.offer
    for names in values:
        section(next(iter(names))).values.update(names)
    for path, node in structure.items():
        section(".".join(map(str, path))).structure[path] = node
    return offers


def _check_text(name: str) -> None:
    """Raises UsageError where an index could not hold a name."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the name {name!r} holds half of a character: {error.reason}",
            hint="such text comes from file names that are no UTF-8: rename the key",
        ) from error


def _warn_of_differences(digests: Sequence[Mapping[str, int]]) -> None:
    """Say which values are not the same on all ranks that have them."""
    for name in differing(digests):
        logger.warning(
            "`%s` differs between ranks: the first rank's is kept. State of one rank alone "
            "needs a key of its own, such as `rank_3`",
            name,
        )
