"""Load: fit, reshard, read, cover."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from holdfast.catalog.findings import PARTS
from holdfast.engine.collector import collector_at_rest
from holdfast.engine.opening import read_at
from holdfast.engine.ranks import Ranks, all_ranks, hosts_of, on_every_rank
from holdfast.engine.read import Wanted, read_tensors, threads_for
from holdfast.engine.replicas import Place, ask, read_shared
from holdfast.engine.source import Source, read_value
from holdfast.engine.spans import Spans
from holdfast.engine.values import decode_value
from holdfast.errors import MismatchError
from holdfast.format.manifest import Manifest, ValueEntry
from holdfast.state.layout import Layouts, local_of
from holdfast.state.objects import StateTree
from holdfast.state.optim import TensorInfo
from holdfast.state.tree import Leaf

_LISTED_MAX = 50


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

    num_matched: int = 0
    """Entries that this rank has loaded."""

    lacking: tuple[str, ...] = ()
    """Tensors of this rank that a base may lack, and does: they stay as they are."""


def load(path: str | os.PathLike[str], state: Mapping[str, Any], *, strict: bool = True) -> Loaded:
    """Load the checkpoint at `path` into `state`, in place: tensors are written over, plain values
    replaced, objects given their state dict. Any layout loads what any other has saved.

    `state` names what is wanted; other top-level names of the checkpoint are left alone. Below the
    names given, the checkpoint must have the same entries, unless `strict` is false: then what it
    has beyond them is left alone too. What is wanted must always be there.

    Collective where `torch.distributed` is initialized: every rank calls this with its part of the
    state; an error on one is raised on all.

    Raises:
        NotFoundError: no checkpoint at `path`.
        MismatchError: entries that are missing, unexpected or of another shape, all of them listed;
            nothing was changed.
        DamagedError: bytes are not those that were saved; the state may be loaded in part.
        FormatError: the checkpoint holds what could be read only by running its code.
    """
    ranks = all_ranks()
    try:
        return read_at(
            path,
            ranks,
            lambda source: load_tree(source, StateTree(state), ranks=ranks, strict=strict),
        )
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
    manifest = source.manifest
    with spans("plan"), collector_at_rest():
        leaves = on_every_rank(ranks, tree.leaves)
        stored = {name: (entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
        room = on_every_rank(ranks, lambda: tree.room_for(stored))
        unfit, differences = _differences(source, tree, leaves, room, ranks, strict)
        if differences and not partial:
            raise _mismatch(source, differences)
        lacking = [n for n, leaf in leaves.items() if n not in stored and tree.lacks(leaf.path)]
        leaves = on_every_rank(ranks, lambda: _leaves_with_room(manifest, tree, stored))
        leaves = {name: leaf for name, leaf in leaves.items() if name not in unfit}
        wanted, entries = on_every_rank(ranks, lambda: _wanted(manifest, leaves))
    with spans("read"):
        nbytes, containers = _read(source, wanted.values(), entries, ranks, fill, replicas)
        values = on_every_rank(ranks, lambda: _values(source, leaves, wanted, containers))
    with spans("apply"):
        on_every_rank(ranks, lambda: tree.take(leaves, values))
    converted = [
        name
        for name, leaf in leaves.items()
        if isinstance(leaf.value, torch.Tensor)
        and str(leaf.value.dtype) != f"torch.{manifest.tensors[name].dtype}"
    ]
    return Loaded(
        *(source.url, nbytes, tuple(converted), spans, tuple(differences), len(leaves)),
        lacking=tuple(lacking),
    )


def _leaves_with_room(
    manifest: Manifest, tree: StateTree, stored: Mapping[str, TensorInfo]
) -> dict[str, Leaf]:
    tree.prepare(stored)
    there = manifest.tensors.keys() | manifest.values.keys()
    return {name: leaf for name, leaf in tree.leaves().items() if name in there}


def _differences(
    source: Source,
    tree: StateTree,
    leaves: Mapping[str, Leaf],
    room: Collection[str],
    ranks: Ranks,
    strict: bool,
) -> tuple[set[str], list[str]]:
    """Entries of this rank that the checkpoint does not fit, and a line on each difference of all
    ranks. Collective.

    An entry is unexpected where no rank wants it: a pipeline stage wants its own layers only.
    """
    manifest = source.manifest
    misfits = {name: [*_misfit(manifest, tree, name, leaf)] for name, leaf in leaves.items()}
    wrong = [line for lines in misfits.values() for line in lines]
    paths = {name: entry.path for name, entry in manifest.tensors.items()}
    paths |= {name: entry.path for name, entry in manifest.values.items()}
    unexpected = {
        name
        for name, path in paths.items()
        if strict and name not in leaves and name not in room and tree.wants(path)
    }
    reports = ranks.gather((wrong, unexpected))
    listed: list[str] = []
    if reports:
        listed = list(dict.fromkeys(line for report, _ in reports for line in report))
        nobodys = set.intersection(*(names for _, names in reports))
        listed += [f"`{n}` is in the checkpoint, but not wanted" for n in paths if n in nobodys]
    return {name for name, lines in misfits.items() if lines}, ranks.broadcast(listed)


def _mismatch(source: Source, listed: Sequence[str]) -> MismatchError:
    more = len(listed) - _LISTED_MAX
    parts = {line.removeprefix("`").partition(".")[0] for line in listed}
    hint = (
        "is it a checkpoint of another model? `checkpoint.exclude_from_loading` leaves out whole "
        "parts, such as `optimizer` or `dataloader`"
    )
    if parts <= {*PARTS}:
        hint = (
            "the model fits, what wrote the rest was another program or another setting: "
            f"`--checkpoint.exclude_from_loading {','.join(sorted(parts))}` starts that afresh"
        )
    return MismatchError(
        f"`{source.url}` does not fit, {len(listed)} differences, nothing was changed:\n  "
        + "\n  ".join(listed[:_LISTED_MAX])
        + (f"\n  ... and {more} more" if more > 0 else ""),
        hint=hint,
    )


def _misfit(manifest: Manifest, tree: StateTree, name: str, leaf: Leaf) -> Iterator[str]:
    entry = manifest.tensors.get(name)
    value = leaf.value
    if entry is None and name not in manifest.values:
        if not tree.optional(leaf.path):
            yield f"`{name}` is not in the checkpoint"
    elif not isinstance(value, torch.Tensor):
        if entry is not None and not (_is_number(value) and math.prod(entry.shape) == 1):
            yield f"`{name}` is a tensor in the checkpoint, a {type(value).__name__} is wanted"
    elif entry is None:
        yield f"`{name}` is a plain value in the checkpoint, a tensor is wanted"
    elif entry.shape != tuple(value.shape):
        yield f"`{name}` is {list(entry.shape)} in the checkpoint, {list(value.shape)} is wanted"
    elif not torch.can_cast(getattr(torch, entry.dtype), value.dtype):
        yield f"`{name}` is {entry.dtype} in the checkpoint, {value.dtype} is wanted"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


@torch.no_grad()
def _wanted(
    manifest: Manifest, leaves: Mapping[str, Leaf]
) -> tuple[dict[str, Wanted], dict[str, ValueEntry]]:
    """The tensors that are to be read, and the values."""
    wanted: dict[str, Wanted] = {}
    layouts = Layouts()
    for name, leaf in leaves.items():
        entry = manifest.tensors.get(name)
        if entry is None and not isinstance(leaf.value, torch.Tensor):
            continue
        into = leaf.value
        if not isinstance(into, torch.Tensor):
            assert entry is not None
            into = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        local = local_of(into)
        wanted[name] = Wanted(name, layouts.of(name, into, local).pieces, local.detach())
    return wanted, {name: manifest.values[name] for name in leaves if name not in wanted}


def _read(
    source: Source,
    wanted: Collection[Wanted],
    entries: Mapping[str, ValueEntry],
    ranks: Ranks,
    fill: Fill | None,
    replicas: Replicas,
) -> tuple[int, Mapping[Place, bytes]]:
    """Fill the tensors. Returns the bytes read, and the containers that came from other ranks.
    Collective."""
    if fill is not None:
        return on_every_rank(ranks, lambda: fill(source, [*wanted])), {}
    hosts = hosts_of(ranks)
    threads = threads_for(hosts.num_local)
    far = hosts.num_hosts > 1 or "://" in source.store.url
    if ranks.size == 1 or not (replicas == "broadcast" or (replicas == "auto" and far)):
        return on_every_rank(ranks, lambda: read_tensors(source, [*wanted], threads)), {}
    asked = on_every_rank(ranks, lambda: ask(source, [*wanted], entries))
    nbytes = on_every_rank(ranks, lambda: read_shared(source, asked, ranks, threads))
    return nbytes, asked.containers


def _values(
    source: Source,
    leaves: Mapping[str, Leaf],
    wanted: Mapping[str, Wanted],
    containers: Mapping[Place, bytes],
) -> dict[str, Any]:
    """What goes to the leaves that are no tensors. A container that no other rank has read is read
    here."""
    values: dict[str, Any] = {}
    decoded: dict[Place, Any] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf.value, torch.Tensor):
            continue
        if name in wanted:
            values[name] = type(leaf.value)(wanted[name].local.item())
            continue
        value = source.manifest.values[name]
        at = (value.file, value.item.offset)
        if at not in decoded:
            container = containers.get(at) or read_value(source, name, value)
            decoded[at] = decode_value(name, container, where=f"{source.url}/{value.file}")
        # One container may stand for many names; each gets a value of its own.
        values[name] = copy.deepcopy(decoded[at])
    return values
