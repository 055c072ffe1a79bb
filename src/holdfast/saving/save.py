"""Save: plan, stage, write, commit."""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from holdfast.catalog.arguments import place_to_save
from holdfast.catalog.catalog import Catalog
from holdfast.comm import (
    Ranks,
    all_ranks,
    capture,
    gather_and_run,
    run_on_all,
    run_on_rank_0,
)
from holdfast.errors import HoldfastError, StorageError
from holdfast.format.manifest import Kind
from holdfast.format.names import Aside
from holdfast.format.region import Region
from holdfast.planning.file_layout import FileLayout, TensorItem
from holdfast.planning.gc_pause import gc_paused
from holdfast.planning.index import Index
from holdfast.release import installed_version
from holdfast.saving.background import lower_priority
from holdfast.saving.commit import commit
from holdfast.saving.digests import (
    Group,
    Replicas,
    ValueDigests,
    groups_that_differ,
    names_that_differ,
)
from holdfast.saving.planner import LocalState, Planner
from holdfast.saving.publish import Facts
from holdfast.saving.stage import Snapshot, Staging, TensorOf, box_of, host_bytes, host_windows
from holdfast.saving.write import Pace, WriteResult, write
from holdfast.spelling import spelled_bytes
from holdfast.state.objects import StateTree
from holdfast.state.tree import FlatState
from holdfast.storage.local import NO_SPACE
from holdfast.timing import Spans
from holdfast.uncompiled import uncompiled

logger: logging.Logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is published and durable."""

    where: str
    nbytes: int
    spans: Spans


@uncompiled
def save(path: str | os.PathLike[str], state: Any, *, overwrite: bool = False) -> Saved:
    """Save `state` as one checkpoint at `path`, published whole or not at all.

    `overwrite` replaces one checkpoint that is there, and nothing else: no folder of checkpoints,
    no run, no folder with other files. Of several threads and processes that save to one path at
    once, one does, and the others raise ExistsError.

    `state` is a dict of tensors, DTensors, plain values, further dicts and lists of these, and of
    objects with `state_dict` and `load_state_dict`: modules, optimizers (whose entries are named by
    the parameters of the modules beside them), schedulers. Or it is a module alone. What
    `state_dict` of an object says is what is saved. Stock `torch.distributed.checkpoint` finds the
    same names.

    Collective where `torch.distributed` is initialized: every rank calls this with its part of the
    state; an error on one is raised on all.

    Raises:
        ExistsError: there is something at `path`, and `overwrite` is false, or it is not one
            checkpoint; or it came there, or is being replaced, meanwhile.
        UsageError: an argument of another type; or what would not come back as it is, with its name
            and type. Nothing was written.
        StorageError: no space, no rights; nothing is left behind.
    """
    with gc_paused():
        ranks = all_ranks()
        try:
            check = partial(place_to_save, path, state, overwrite=overwrite)
            catalog, name = run_on_all(ranks, check)
            return save_in(catalog, name, state, ranks=ranks, overwrite=overwrite)
        finally:
            ranks.close()


def save_in(
    catalog: Catalog, name: str, state: Mapping[str, Any], *, ranks: Ranks, overwrite: bool
) -> Saved:
    """As `save`, to the checkpoint `name` of `catalog`, by these ranks."""
    run_on_rank_0(ranks, lambda: _check_free(catalog, name, overwrite))
    flat = run_on_all(ranks, lambda: StateTree(state).flatten())
    try:
        return save_leaves(
            catalog, name, flat, ranks=ranks, planner=Planner(ranks), overwrite=overwrite
        )
    finally:
        # An interrupt ends no process where a notebook runs, and its traceback keeps the catalog.
        catalog.release_all()


def _check_free(catalog: Catalog, name: str, overwrite: bool) -> None:
    """Make sure that the folder is there and the name may be taken."""
    catalog.store.make_folder("")
    hint = "choose another path, or pass `overwrite=True` to replace it"
    catalog.check_free(name, replace=overwrite, hint=hint)


@dataclass(frozen=True, slots=True)
class Pending:
    """A save that all ranks have agreed on; its attempt folder is there, and empty."""

    catalog: Catalog
    attempt: Aside
    file_layout: FileLayout
    tensor_of: TensorOf
    """What is written: the training state, until a snapshot takes its place."""

    index: Index | None
    """What the layout decides of both indices, on rank 0."""

    facts: Facts
    spans: Spans
    replicas: Replicas
    """What optimizers change and other ranks hold too; compared before the save is published."""

    stepped: frozenset[str]
    """Names of all that only optimizers change."""

    memory: memoryview | None = None
    """Of a snapshot: laid out as the file that this rank writes."""

    def windows_of(self, item: TensorItem) -> Iterable[memoryview]:
        """Its bytes, as `write` takes them."""
        return host_windows(self.tensor_of(item), item.dtype)

    def data_of(self, item: TensorItem, box: Region) -> memoryview:
        """The bytes of a box of it, row-major; `box` is counted from the first of its elements."""
        return host_bytes(box_of(self.tensor_of(item), box), item.dtype)


def save_leaves(
    catalog: Catalog,
    name: str,
    state: FlatState,
    *,
    ranks: Ranks,
    planner: Planner,
    step: int | None = None,
    kind: Kind | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = True,
) -> Saved:
    """Save flat state as checkpoint `name` of `catalog`. `overwrite`: in place of one that has the
    name now.

    Floating-point tensors are converted to `dtype` where one is given.

    Collective: every rank calls this; an error on one is raised on all, and the catalog is as it
    was before.
    """
    pending = begin_save(
        catalog,
        name,
        state,
        ranks=ranks,
        planner=planner,
        step=step,
        kind=kind,
        dtype=dtype,
        overwrite=overwrite,
    )
    return finish_save(pending, ranks)


def begin_save(
    catalog: Catalog,
    name: str,
    state: FlatState,
    *,
    ranks: Ranks,
    planner: Planner,
    step: int | None = None,
    kind: Kind | None = None,
    dtype: torch.dtype | None = None,
    metrics: Mapping[str, float] | None = None,
    model: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> Pending:
    """Agree on a save: everything of `save_leaves` up to the first byte. Collective.

    `metrics` are kept in the manifest, and `model`, its configuration on the hub: those of rank 0.
    `overwrite`: a checkpoint that has the name now may be replaced.
    """
    spans = Spans()
    with spans("plan"):
        while True:
            held = capture(lambda: planner.hold(state, dtype))
            planner.agree(held)
            assert isinstance(held, LocalState)
            begin = partial(_begin, catalog, name, overwrite=overwrite)
            begun = _begin_alike(held, begin, planner=planner, ranks=ranks)
            if begun is not None:
                break
    file_layout, attempt = begun
    layout = {"world_size": ranks.size}
    facts = Facts(step, kind, layout, _versions(), metrics or {}, model or {})
    return Pending(
        catalog,
        attempt,
        file_layout,
        tensor_of=partial(_live, held),
        index=planner.index,
        facts=facts,
        spans=spans,
        replicas=planner.replicas(held, stepped=True),
        stepped=planner.stepped,
    )


def _begin_alike(
    held: LocalState, begin: Callable[[int], Aside], *, planner: Planner, ranks: Ranks
) -> tuple[FileLayout, Aside] | None:
    """Make the attempt for what the ranks hold, if they hold the same of what they hold alike:
    `begin(nbytes)` makes it.

    Else the first rank's version is the one that is kept, from the next plan on, which is said:
    None. What optimizers change is compared later, since that takes longer; there a difference is
    an error. Collective.
    """
    replicas = planner.replicas(held, stepped=False)

    def look() -> tuple[FileLayout, ValueDigests]:
        replicas.take()
        return planner.file_layout(held), planner.value_digests(held)

    looked = capture(look)
    mine: HoldfastError | tuple[int, dict[Group, int], dict[int, int]]
    if isinstance(looked, HoldfastError):
        mine = looked
    else:
        mine = looked[0].nbytes, replicas.by_group(), looked[1].by_group()

    def compare(
        everyone: list[tuple[int, dict[Group, int], dict[int, int]]],
    ) -> Aside | tuple[list[Group], list[int]]:
        tensors = groups_that_differ([groups for _, groups, _ in everyone])
        values = groups_that_differ([groups for _, _, groups in everyone])
        if tensors or values:
            return tensors, values
        return begin(sum(nbytes for nbytes, _, _ in everyone))

    begun = gather_and_run(ranks, mine, compare)
    assert not isinstance(looked, HoldfastError)
    if isinstance(begun, Aside):
        return looked[0], begun
    theirs = replicas.of(begun[0]), looked[1].of(begun[1])
    names, values = gather_and_run(
        ranks,
        theirs,
        lambda everyone: (
            names_that_differ([tensors for tensors, _ in everyone]),
            names_that_differ([values for _, values in everyone]),
        ),
    )
    planner.keep_first(names)
    planner.warned_of(values)
    if ranks.rank == 0:
        for one in values:
            logger.warning(
                "`%s` differs between ranks: the first rank's is kept. State of one rank alone "
                "needs a key of its own, such as `rank_3`",
                one,
            )
        for one, (first, other) in names.items():
            logger.warning(
                "`%s` differs between ranks %d and %d: the version of the first rank that holds it "
                "is kept. State of one rank alone needs a key of its own, such as `rank_%d`",
                one,
                first,
                other,
                other,
            )
    return None


def take_snapshot(
    pending: Pending,
    snapshot: Snapshot,
    ranks: Ranks,
    *,
    now: Sequence[TensorItem],
    later: Sequence[TensorItem],
) -> tuple[Pending, Staging]:
    """The same save from a host copy, which the snapshot has room for, and the copy of what is
    left: when this returns, training may change all but what is to be copied `later`, and that once
    it has waited for the copy. `now` and `later` are all items of the image. Collective.
    """
    with pending.spans("stage"):
        try:
            run_on_all(ranks, lambda: _copy(pending, snapshot, now, is_last=not later))
        except HoldfastError:
            discard(pending, ranks)
            raise
    staging = Staging(lambda: _copy(pending, snapshot, later, is_last=bool(later)))
    memory = snapshot.memory(pending.file_layout.nbytes)
    return replace(pending, tensor_of=snapshot.tensor_of, memory=memory), staging


def _copy(
    pending: Pending, snapshot: Snapshot, items: Sequence[TensorItem], *, is_last: bool
) -> None:
    """Copy these items; with the last of them take the digests, before training changes
    anything."""
    snapshot.copy(items, pending.tensor_of)
    if is_last:
        pending.replicas.take()


def discard(pending: Pending, ranks: Ranks) -> None:
    """Give up a save that has begun."""
    if ranks.rank == 0:
        pending.catalog.discard(pending.attempt)


def finish_save(
    pending: Pending,
    ranks: Ranks,
    *,
    staging: Staging | None = None,
    bytes_per_s: float | None = None,
) -> Saved:
    """Finish the copy, write and publish. Collective, over ranks that nothing else uses in the
    meantime. With a copy to finish it is called in a thread of its own.

    `bytes_per_s` is how fast this rank may write.
    """
    catalog, attempt, spans = pending.catalog, pending.attempt, pending.spans

    def stage_and_write() -> WriteResult:
        if staging is not None:
            with spans("stage"):
                staging.run()
            # Optimizers wait for a copy, but nobody for what follows it.
            lower_priority()
        if pending.index is not None and not pending.index.is_encoded:
            _make_beside(pending.index)
        # A snapshot has them from the instant of its copy.
        live = pending.memory is None and not pending.replicas.is_empty
        pace = Pace(bytes_per_s)
        data = pending.windows_of if pending.memory is None else pending.memory
        with _beside(pending.replicas.take) if live else nullcontext():
            result = write(catalog.store, str(attempt), pending.file_layout, data, pace, spans)
        return replace(result, seconds=dict(spans.seconds))

    written = capture(stage_and_write)
    with spans("commit"):
        nbytes = commit(
            attempt,
            written,
            index=pending.index,
            facts=pending.facts,
            replicas=pending.replicas,
            catalog=catalog,
            ranks=ranks,
        )
    return Saved(catalog.where(attempt.name), nbytes, spans)


@contextmanager
def _beside(work: Callable[[], None]) -> Iterator[None]:
    """Do work in a thread of its own while a file is written: the disk is what a write waits for.
    Raises its error at the end."""
    outcome: list[HoldfastError | None] = []
    thread = threading.Thread(target=lambda: outcome.append(capture(work)), name="holdfast-hash")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if outcome[0] is not None:
        raise outcome[0]


def _make_beside(index: Index) -> None:
    """Begin to make the bytes of both indices, which `commit` asks for: the disk is what a write
    waits for."""
    # What goes wrong there goes wrong again, and is told, where they are asked for.
    making = partial(capture, index.encoded)
    threading.Thread(target=making, name="holdfast-index", daemon=True).start()


def _begin(catalog: Catalog, name: str, nbytes: int, overwrite: bool) -> Aside:
    free = catalog.store.free_bytes()
    if free is not None and nbytes > free:
        raise StorageError(
            f"`{catalog.where(name)}` needs {spelled_bytes(nbytes)}, "
            f"{spelled_bytes(free)} are free",
            hint=NO_SPACE,
        )
    return catalog.begin(name, replace=overwrite)


def _live(held: LocalState, item: TensorItem) -> torch.Tensor:
    """A region of the tensor that training goes on with."""
    pieces, region = held.seen[item.name].layout.pieces, item.region
    piece = pieces[0]
    # Most are written whole, by the rank that has them: then there is nothing to work out.
    if piece.region != region:
        piece = next(p for p in pieces if p.region & region == region)
    return box_of(held.tensors[item.name].detach(), piece.local_of(region))


@cache
def _versions() -> dict[str, str]:
    return {
        "holdfast": installed_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
