"""Who writes what: pure values in, pure values out.

Each rank offers the regions that it holds. What several ranks hold is written by one of them, so
that every element is on disk once and the ranks write about the same number of bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.errors import MismatchError
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Path
from holdfast.format.region import Region, first_overlap


@dataclass(frozen=True, slots=True)
class TensorOffer:
    """What a rank holds of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    path: Path


@dataclass(frozen=True, slots=True)
class Offer:
    """What a rank holds of the whole state."""

    tensors: dict[str, TensorOffer] = field(default_factory=dict)
    values: dict[str, Path] = field(default_factory=dict)
    aliases: dict[str, tuple[str, Path]] = field(default_factory=dict)
    """Second names of tensors (tied weights), with the first: stored once, found under both."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank is to write."""

    regions: tuple[tuple[str, Region], ...]
    values: tuple[str, ...]


def shares(offers: Sequence[Offer]) -> list[Share]:
    """What each rank is to write, so that every element and every value is written once.

    Regions of one rank alone go to it; the others, largest first, to the rank with the fewest bytes
    so far among those that hold them. Values go to the first rank that offers them.

    Raises:
        MismatchError: the ranks do not hold one whole state between them; lists every tensor.
    """
    holders = _holders(offers)
    load = [0] * len(offers)
    given: list[list[tuple[str, Region]]] = [[] for _ in offers]
    shared: list[tuple[int, str, Region, list[int]]] = []
    for name, regions in holders.items():
        itemsize = dtype_of(_first(offers, name).dtype).itemsize
        for region, ranks in regions.items():
            nbytes = region.num_elements * itemsize
            if len(ranks) == 1:
                load[ranks[0]] += nbytes
                given[ranks[0]].append((name, region))
            else:
                shared.append((nbytes, name, region, ranks))
    for nbytes, name, region, ranks in sorted(shared, key=lambda s: -s[0]):
        rank = min(ranks, key=load.__getitem__)
        load[rank] += nbytes
        given[rank].append((name, region))
    writer: dict[str, int] = {}
    for rank, offer in enumerate(offers):
        for name in offer.values:
            writer.setdefault(name, rank)
    values: list[list[str]] = [[] for _ in offers]
    for name, rank in writer.items():
        values[rank].append(name)
    return [Share(tuple(g), tuple(v)) for g, v in zip(given, values, strict=True)]


def differing(digests: Sequence[Mapping[str, int]]) -> list[str]:
    """Names under which ranks hold different values; one digest a value, for each rank."""
    first: dict[str, int] = {}
    for held in digests:
        first = {**held, **first}
    return [
        n for n, digest in first.items() if any(held.get(n, digest) != digest for held in digests)
    ]


def _first(offers: Sequence[Offer], name: str) -> TensorOffer:
    return next(offer.tensors[name] for offer in offers if name in offer.tensors)


def _holders(offers: Sequence[Offer]) -> dict[str, dict[Region, list[int]]]:
    """Ranks that hold each region of each tensor; checked to make up every tensor exactly."""
    holders: dict[str, dict[Region, list[int]]] = defaultdict(lambda: defaultdict(list))
    known: dict[str, TensorOffer] = {}
    wrong = _disagreements(offers)
    tied = {name for offer in offers for name in offer.aliases}
    for rank, offer in enumerate(offers):
        for name, tensor in offer.tensors.items():
            if name in tied:
                continue
            first = known.setdefault(name, tensor)
            if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
                wrong.append(
                    f"`{name}` is {tensor.dtype} {list(tensor.shape)} on rank {rank}, "
                    f"{first.dtype} {list(first.shape)} on an earlier one"
                )
            for region in tensor.regions:
                holders[name][region].append(rank)
    for name, tensor in known.items():
        held = sum(region.num_elements for region in holders[name])
        wanted = Region.whole(tensor.shape).num_elements
        if held != wanted or first_overlap(holders[name]):
            wrong.append(f"`{name}`: the ranks hold {held} of {wanted} elements, or some twice")
    if wrong:
        raise MismatchError(
            "the ranks do not hold one whole state:\n  " + "\n  ".join(wrong),
            hint="give rank-specific state a key of its own, such as `rank_3`; shard by DTensor",
        )
    return holders


def _disagreements(offers: Sequence[Offer]) -> list[str]:
    """Names that stand for different kinds of things on different ranks."""
    tensors = {name for offer in offers for name in (*offer.tensors, *offer.aliases)}
    tied = {n: (rank, a[0]) for rank, offer in enumerate(offers) for n, a in offer.aliases.items()}
    wrong = []
    for rank, offer in enumerate(offers):
        for name in offer.values:
            if name in tensors:
                wrong.append(f"`{name}` is a tensor on one rank, a value on rank {rank}")
        for name, tensor in offer.tensors.items():
            # A rank without elements has no memory to see by that two tensors are one.
            if name in tied and tensor.regions:
                where, first = tied[name]
                wrong.append(
                    f"`{name}` is tied to `{first}` on rank {where}, "
                    f"a tensor of its own on rank {rank}"
                )
    return wrong
