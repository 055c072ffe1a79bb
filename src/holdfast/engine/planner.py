"""The plan that all ranks follow: agreed once, and kept while nobody's layout changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from holdfast.engine.index import Index, columns
from holdfast.engine.plan import (
    Offer,
    Offers,
    Plan,
    TensorOffer,
    View,
    census_from,
    census_of,
    differing,
    plan,
    views_of,
)
from holdfast.engine.ranks import Ranks, conclude, gather_distinct, on_every_rank, on_rank_0
from holdfast.engine.values import Containers
from holdfast.engine.write import FileImage, TensorItem, image_of, lay_out
from holdfast.errors import HoldfastError
from holdfast.format.checksum import checksum
from holdfast.state.layout import Known, Layout, dtype_name, layout_of, same_memory
from holdfast.state.tree import Leaf

logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Held:
    """What this rank holds: tensors by name with how they lie, and values."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    offers: dict[str, Offer] = field(default_factory=dict)


class Planner:
    """Who writes what, agreed between the ranks once and kept while nobody's layout changes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._known: Known = {}
        self._containers = Containers()
        self._offers: Offers | None = None
        self._items: tuple[TensorItem, ...] = ()
        self._values: tuple[str, ...] = ()
        self.index: Index | None = None
        """On rank 0, once there is a plan."""

    @torch.no_grad()
    def hold(self, leaves: Mapping[str, Leaf], dtype: torch.dtype | None) -> Held:
        """What this rank has to offer; floating-point tensors as `dtype`, where one is given."""
        held = Held()
        names: dict[int, list[str]] = {}
        for name, leaf in leaves.items():
            head, dot, _ = name.partition(".")
            section = head if dot else ""
            if section not in held.offers:
                held.offers[section] = Offer()
            offer = held.offers[section]
            if not isinstance(leaf.value, torch.Tensor):
                called = leaf.names or {name: leaf.path}
                held.values.update(dict.fromkeys(called, leaf.value))
                offer.values.update(called)
                continue
            layout = layout_of(name, leaf.value, self._known)
            if layout.local.numel():
                # Few begin where another does: only of these more is looked at.
                beside = names.setdefault(layout.local.data_ptr(), [])
                tied = [n for n in beside if same_memory(leaf.value, leaves[n].value)]
                if tied:
                    offer.aliases[name] = (tied[0], leaf.path)
                    continue
                beside.append(name)
            held.layouts[name] = layout
            stored_as = layout.dtype
            if dtype is not None and layout.local.is_floating_point():
                stored_as = dtype_name(dtype)
            offer.tensors[name] = TensorOffer(stored_as, layout.shape, leaf.path, layout.spread)
        return held

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
        # An option of an optimizer is one value under the names of all its parameters.
        once: dict[int, bytes] = {}
        containers = {}
        for name in self._values:
            value = held.values[name]
            if id(value) not in once:
                once[id(value)] = self._containers.of(name, value)
            containers[name] = once[id(value)]
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
        mine = on_every_rank(
            ranks, lambda: whole[0] if whole else plan(census_from(view, held.offers, ranks.size))
        )
        self._values = tuple(name for name, (rank, _) in mine.values.items() if rank == ranks.rank)
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
        shared = [
            name
            for section, offer in held.offers.items()
            for name in offer.values
            if len(view.get(section, ())) != 1 or len(view[section][0][0]) > 1
        ]
        return {n: checksum(self._containers.of(n, held.values[n])) for n in shared}


def _warn_of_differences(digests: Sequence[Mapping[str, int]]) -> None:
    """Say which values are not the same on all ranks that have them."""
    for name in differing(digests):
        logger.warning(
            "`%s` differs between ranks: the first rank's is kept. State of one rank alone "
            "needs a key of its own, such as `rank_3`",
            name,
        )
