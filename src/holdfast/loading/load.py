"""Load: fit, reshard, read, cover."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from holdfast.catalog.arguments import check_to_load
from holdfast.catalog.source import Source, read_value
from holdfast.comm import Ranks, all_ranks, hosts_of, run_on_all
from holdfast.errors import HoldfastError, MismatchError
from holdfast.format.manifest import TensorEntry
from holdfast.loading.fit import fits, is_narrowed
from holdfast.loading.opening import read_in
from holdfast.loading.read import Wanted, read_tensors, threads_for
from holdfast.loading.replicas import Place, ask, read_shared
from holdfast.planning.gc_pause import gc_paused
from holdfast.state.layout import Layouts, local_of
from holdfast.state.match import MadeValues, Match
from holdfast.state.objects import StateTree
from holdfast.state.values import decode_value
from holdfast.timing import Spans
from holdfast.uncompiled import uncompiled

_LISTED_MAX = 50

logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load did."""

    where: str
    nbytes: int
    """Read by this rank."""

    converted: tuple[str, ...]
    """Tensors whose stored dtype is another than the one that they were loaded into."""

    spans: Spans

    differences: tuple[str, ...] = ()
    """What the checkpoint and the state do not have in common, where that was allowed: a line each,
    over all ranks."""

    notes: tuple[str, ...] = ()
    """What is loaded otherwise than it was saved, such as the state of another optimizer: a line
    each, over all ranks."""

    num_matched: int = 0
    """Entries that this rank has loaded."""

    lacking: tuple[str, ...] = ()
    """Tensors of this rank that a base may lack, and does: they stay as they are."""


@uncompiled
def load(path: str | os.PathLike[str], state: Any, *, strict: bool = True) -> Loaded:
    """Load the checkpoint at `path` into `state`, in place: tensors are written over, objects given
    what their `state_dict` said, everything else replaced by what was saved. Any layout loads what
    any other has saved.

    `state` is a dict of what is wanted, or a module alone; other top-level names of the checkpoint
    are left alone. Below the names given, dicts and modules must have the same entries as the
    checkpoint, unless `strict` is false: then what it has beyond them is left alone too. What is
    wanted must always be there. Lists, and the state of objects, come back as they were saved,
    whatever stood in their place.

    Collective where `torch.distributed` is initialized: every rank calls this with its part of the
    state; an error on one is raised on all.

    Raises:
        UsageError: an argument of another type.
        NotFoundError: no checkpoint at `path`.
        MismatchError: entries that are missing, unexpected, of another shape, or whole numbers that
            do not fit, all of them listed; nothing was changed. Or an object refuses its state, or
            a number is too large for a smaller float: the state is loaded in part.
        DamagedError: bytes are not those that were saved; the state may be loaded in part.
        FormatError: the checkpoint holds what could be read only by running its code.
    """
    ranks = all_ranks()
    try:
        store, name = run_on_all(ranks, lambda: check_to_load(path, state, strict=strict))
        tree = run_on_all(ranks, lambda: StateTree(state))
        loaded = read_in(
            store,
            name,
            ranks,
            lambda source: load_tree(source, tree, ranks=ranks, strict=strict),
        )
        for line in loaded.notes if ranks.rank == 0 else ():
            logger.warning("%s", line)
        return loaded
    finally:
        ranks.close()


Fill = Callable[[Source, Sequence[Wanted]], int]
"""Brings the wanted tensors of a source into memory, and tells how many bytes it read."""

Replicas = Literal["auto", "read", "broadcast"]
"""How what several ranks want alike comes to them. `read`: each reads it for itself. `broadcast`:
one reads and checks it, and passes it on, so that no byte is read twice. `auto`: `broadcast` where
the checkpoint is behind a URL or the ranks are on several hosts, since each would fetch it over the
network; the ranks of one host are served by one page cache, and would wait for each other."""


def load_tree(
    source: Source,
    tree: StateTree,
    *,
    ranks: Ranks,
    strict: bool = True,
    partial: bool = False,
    fill: Fill | None = None,
    replicas: Replicas = "read",
) -> Loaded:
    """Load an open checkpoint into a tree of state. `partial`: what is missing there or does not
    fit stays as it is, and every difference is reported. `fill` stands in for `read_tensors`, and
    nothing is passed on then.

    Collective: every rank calls this; an error on one is raised on all. Objects are given their
    state only once every rank has read all that it wants.
    """
    spans = Spans()
    # A load inside of `torch.inference_mode` would make tensors that no training can change.
    with torch.inference_mode(mode=False):
        with spans("plan"), gc_paused():
            match = run_on_all(ranks, lambda: tree.match(source.manifest, strict=strict))
            differences, notes = _differences(match, ranks)
            if differences and not partial:
                raise _mismatch(source, differences)
            reading = run_on_all(ranks, lambda: _Reading(source, match))
        with spans("read"):
            nbytes = _read(reading, ranks, fill, replicas)
            values = run_on_all(ranks, reading.values)
        with spans("apply"):
            reading.settle()
            _hand_over(match, values, ranks)
    return Loaded(
        source.url,
        nbytes,
        converted=reading.converted(),
        spans=spans,
        differences=tuple(differences),
        notes=tuple(notes),
        num_matched=len(reading.wanted) + len(match.values),
        lacking=tuple(match.lacking),
    )


def _hand_over(match: Match, values: MadeValues, ranks: Ranks) -> None:
    """Give objects and containers what was read. Collective."""
    try:
        run_on_all(ranks, lambda: match.take(values))
    except HoldfastError as error:
        # Tensors have been read into their places, and other objects may have their state.
        error.what += "; the state is loaded in part"
        raise


def _differences(match: Match, ranks: Ranks) -> tuple[list[str], list[str]]:
    """A line on each difference between the checkpoint and the state of all ranks, and on all else
    that must be said. Collective.

    An entry is unexpected where no rank has a place for it: a pipeline stage has its own layers.
    """
    reports = ranks.gather((list(match.mismatches.values()), list(match.extra), [*match.notes]))
    listed: list[str] = []
    notes: list[str] = []
    if reports:
        listed = list(dict.fromkeys(line for lines, _, _ in reports for line in lines))
        notes = list(dict.fromkeys(line for _, _, lines in reports for line in lines))
        common = set.intersection(*({*names} for _, names, _ in reports))
        extra = [name for name in reports[0][1] if name in common]
        listed += [f"`{name}` is in the checkpoint, but not wanted" for name in extra]
    return ranks.broadcast((listed, notes))


def _mismatch(source: Source, listed: Sequence[str]) -> MismatchError:
    more = len(listed) - _LISTED_MAX
    return MismatchError(
        f"`{source.url}` does not fit, {len(listed)} differences, nothing was changed:\n  "
        + "\n  ".join(listed[:_LISTED_MAX])
        + (f"\n  ... and {more} more" if more > 0 else ""),
        hint="is it a checkpoint of another model? A state without what does not fit loads the "
        "rest: `holdfast show` lists what is there",
    )


_Aside = tuple[torch.Tensor, torch.Tensor]
"""A tensor that was read aside, and the memory that it goes to."""


class _Reading:
    """What one rank reads: tensors into their places, and values."""

    @torch.no_grad()
    def __init__(self, source: Source, match: Match) -> None:
        self.source, self._match = source, match
        self._made = {name: make() for name, make in match.made.items()}
        tensors = source.manifest.tensors
        self._aside: dict[str, _Aside] = {}
        self._narrowed: set[str] = set()
        self._tied = _tied_apart(match.into, tensors)
        apart = {name for pair in self._tied for name in pair}
        early = {name for names, _ in match.checks for name in names}
        self._early = {*early & self._made.keys()}
        self._values: dict[Place, Any] = {}
        layouts = Layouts()
        self.wanted: dict[str, Wanted] = {}
        for name, tensor in {**match.into, **self._made}.items():
            local = local_of(tensor).detach()
            pieces = layouts.of(name, tensor, local_of(tensor)).pieces
            stored: torch.dtype = getattr(torch, tensors[name].dtype)
            narrowed = is_narrowed(stored, local.dtype)
            if narrowed or name in apart:
                # Read aside first: a number that does not fit must not take the place of another.
                like = torch.empty_strided if name in apart else _empty_packed
                aside = like(local.shape, local.stride(), dtype=stored, device=local.device)
                self._aside[name] = (aside, local)
                local = aside
            if narrowed:
                self._narrowed.add(name)
            self.wanted[name] = Wanted(name, pieces, local)
        self.entries = {name: source.manifest.values[name] for name in match.values}
        self.containers: Mapping[Place, bytes] = {}

    def check(self, read: Callable[[Collection[Wanted]], int]) -> int:
        """Read what has to be checked before anything is changed. Returns the bytes read.

        Raises:
            MismatchError: what does not fit where it would go, all of it listed.
        """
        nbytes = read([self.wanted[name] for name in self._checked_first])
        wrong = [
            f"`{name}` holds numbers in the checkpoint that no {local.dtype} is"
            for name, (aside, local) in self._aside.items()
            if name in self._narrowed and not fits(aside, local.dtype)
        ]
        wrong += [
            f"`{first}` and `{name}` are one tensor here, and two that differ in the checkpoint"
            for first, name in self._tied
            if not _same_memory(*(self._aside[one] for one in (first, name)))
        ]
        checks = self._match.checks
        if checks:
            names = dict.fromkeys(name for names, _ in checks for name in names)
            values = self._made_values(name for name in names if name in self.entries)
            wrong += [line for _, check in checks if (line := check(values)) is not None]
        if wrong:
            raise _mismatch(self.source, wrong)
        return nbytes

    def settle(self) -> None:
        """Put what was read aside in its place."""
        for aside, local in self._aside.values():
            local.copy_(aside)

    @property
    def unchecked(self) -> list[Wanted]:
        """What goes straight to its place."""
        first = self._checked_first
        return [want for name, want in self.wanted.items() if name not in first]

    @property
    def _checked_first(self) -> Collection[str]:
        return {**self._aside, **dict.fromkeys(self._early)}

    @property
    def has_checked(self) -> bool:
        """Whether anything is to be checked before it goes to its place."""
        return bool(self._aside or self._match.checks)

    def values(self) -> MadeValues:
        """Everything that has been read. A container that no other rank has read is read here."""
        return self._made_values(self.entries)

    def _made_values(self, names: Iterable[str]) -> MadeValues:
        held: dict[str, Any] = {}
        for name in names:
            entry = self.entries[name]
            at = (entry.file, entry.item.offset)
            if at not in self._values:
                container = self.containers.get(at) or read_value(self.source, name, entry)
                where = f"{self.source.url}/{entry.file}"
                self._values[at] = decode_value(name, container, where=where)
            held[name] = self._values[at]
        return MadeValues(self._made, held)

    def converted(self) -> tuple[str, ...]:
        """Tensors whose dtype is another in the state than in the checkpoint."""
        tensors = self.source.manifest.tensors
        return tuple(
            name
            for name, tensor in self._match.into.items()
            if str(tensor.dtype) != f"torch.{tensors[name].dtype}"
        )


def _tied_apart(
    into: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]
) -> list[tuple[str, str]]:
    """Pairs of entries that go into one memory, but are two tensors in the checkpoint: weights
    that are tied here, and were not when they were saved, or whose copies were stored."""
    places: dict[tuple[object, ...], str] = {}
    pairs = []
    for name, tensor in into.items():
        local = local_of(tensor)
        place = local.data_ptr(), local.numel(), local.dtype, local.device
        if not place[0] or not place[1]:
            continue
        first = places.setdefault(place, name)
        one, other = entries[first], entries[name]
        if first != name and not (one.chunks and one.chunks == other.chunks):
            pairs.append((first, name))
    return pairs


def _same_memory(one: _Aside, other: _Aside) -> bool:
    """Whether two tensors that were read aside would leave the same bytes in the memory that they
    both go to, each by its own strides."""
    made = [aside.to(local.dtype) for aside, local in (one, other)]
    if made[0].stride() != made[1].stride() or made[0].shape != made[1].shape:
        if not all(map(_is_dense, made)):
            return False
        made = [numbers.as_strided((numbers.numel(),), (1,)) for numbers in made]
    first, second = (numbers.contiguous().reshape(-1).view(torch.uint8) for numbers in made)
    return torch.equal(first, second)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order of the dims."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in dims) + 1 == tensor.numel()


def _empty_packed(shape: torch.Size, _: object, **kind: Any) -> torch.Tensor:
    return torch.empty(shape, **kind)


def _read(reading: _Reading, ranks: Ranks, fill: Fill | None, replicas: Replicas) -> int:
    """Fill the tensors. Returns the bytes read. Collective."""
    source, hosts = reading.source, hosts_of(ranks)
    threads = threads_for(hosts.num_local)

    def read(wanted: Collection[Wanted]) -> int:
        if fill is not None:
            return fill(source, [*wanted])
        return read_tensors(source, [*wanted], threads)

    nbytes = 0
    if ranks.all_reduce_max([reading.has_checked])[0]:
        nbytes = run_on_all(ranks, lambda: reading.check(read))
    far = hosts.num_hosts > 1 or "://" in source.store.url
    passed_on = replicas == "broadcast" or (replicas == "auto" and far)
    if ranks.size == 1 or fill is not None or not passed_on:
        return nbytes + run_on_all(ranks, lambda: read(reading.unchecked))
    asked = run_on_all(ranks, lambda: ask(source, reading.unchecked, reading.entries))
    nbytes += run_on_all(ranks, lambda: read_shared(source, asked, ranks, threads))
    reading.containers = asked.containers
    return nbytes
