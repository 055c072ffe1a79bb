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

from holdfast import accelerator
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
from holdfast.format.manifest import Manifest
from holdfast.format.names import HiddenFolder
from holdfast.format.region import Region
from holdfast.planning.file_layout import FileLayout, TensorItem
from holdfast.planning.gc_pause import gc_paused
from holdfast.planning.host_file import FilePart
from holdfast.planning.index import Index
from holdfast.release import installed_version
from holdfast.saving.background import lower_priority
from holdfast.saving.commit import commit
from holdfast.saving.deduplicate import Deduplicator
from holdfast.saving.digests import Replicas, groups_that_differ, names_that_differ
from holdfast.saving.host_file import write_together
from holdfast.saving.planner import LocalState, Planner
from holdfast.saving.seen import check_attempt
from holdfast.saving.stage import Snapshot, Staging, TensorOf, host_bytes, host_windows
from holdfast.saving.write import Pace, WriteResult, write
from holdfast.spelling import spelled_bytes
from holdfast.state.layout import box_of
from holdfast.state.objects import StateTree
from holdfast.state.tree import FlatState
from holdfast.storage.local import NO_SPACE
from holdfast.storage.store import Creating
from holdfast.timing import Spans
from holdfast.uncompiled import uncompiled

logger: logging.Logger = logging.getLogger("holdfast")


@uncompiled
def save(path: str | os.PathLike[str], state: Any, *, overwrite: bool = False) -> Saved:
    """Save `state` as the checkpoint `path`. It is published as a whole or not at all.

    `state`: a dict of tensors, DTensors, plain values, objects with `state_dict` and
    `load_state_dict` (modules, optimizers, schedulers), and dicts and lists of these. Or one
    module. An object is saved as its `state_dict`; the entries of an optimizer are named by the
    parameters of the modules in `state`. Stock `torch.distributed.checkpoint` finds the same names.

    `overwrite`: replace the checkpoint at `path`. A folder of checkpoints, a run, or a folder with
    other files is never replaced. If several threads or processes save to one path at once, one of
    them succeeds and the others raise ExistsError.

    Collective if `torch.distributed` is initialized: every rank calls this with its part of the
    state. An error of one rank is raised on all.

    Raises:
        ExistsError: something exists at `path`, and `overwrite` is false or it is not a checkpoint;
            or another save has created or is replacing it.
        UsageError: an argument has the wrong type, or a load could not restore an entry. The
            message has the entry's name and type. Nothing was written.
        StorageError: space or permissions are missing. Nothing is left behind.
    """
    with gc_paused():
        ranks = all_ranks()
        try:
            check = partial(place_to_save, path, state, overwrite=overwrite)
            catalog, name = run_on_all(ranks, check)
            return save_in(catalog, name, state, ranks=ranks, overwrite=overwrite)
        finally:
            ranks.close()


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is published and durable."""

    where: str
    nbytes: int
    spans: Spans
    shared_nbytes: int = 0
    """Bytes in files that were linked instead of written."""

    @property
    def written_nbytes(self) -> int:
        """Bytes in files that were written."""
        return self.nbytes - self.shared_nbytes


def save_in(
    catalog: Catalog, name: str, state: Mapping[str, Any], *, ranks: Ranks, overwrite: bool
) -> Saved:
    """Save `state` as the checkpoint `name` of `catalog`. Collective."""
    run_on_rank_0(ranks, lambda: _check_free(catalog, name, overwrite))
    flat = run_on_all(ranks, lambda: StateTree(state).flatten())
    try:
        pending = begin_save(catalog, name, flat, planner=Planner(ranks), overwrite=overwrite)
        try:
            check_attempt(catalog, pending.attempt, ranks)
        except HoldfastError:
            abort(pending)
            raise
        return finish_save(pending, ranks)
    finally:
        # In a notebook, the process survives an interrupt, and the traceback keeps the catalog
        # alive. So release the attempt that the catalog holds.
        catalog.release_all()


def _check_free(catalog: Catalog, name: str, overwrite: bool) -> None:
    """Make the folder of the catalog, and check that checkpoint `name` may be created or
    replaced."""
    catalog.store.make_folder("")
    hint = "choose another path, or pass `overwrite=True` to replace it"
    catalog.check_free(name, replace=overwrite, hint=hint)


@dataclass(frozen=True, slots=True)
class Pending:
    """A save that all ranks have planned, with an empty attempt folder."""

    catalog: Catalog
    attempt: HiddenFolder
    file_layout: FileLayout
    held: LocalState
    """State of this rank."""

    tensor_of: TensorOf
    """Function that returns the elements of an item, from the training state or its snapshot."""

    index: Index | None
    """Index of the plan, on rank 0."""

    facts: Manifest
    """Manifest without entries and files."""

    spans: Spans
    replicas: Replicas
    """Tensors that only optimizers change and other ranks hold too. `commit` compares them."""

    stepped: frozenset[str]
    """Names of all tensors that only optimizers change."""

    devices: tuple[torch.device, ...] = ()
    """Accelerators that hold tensors of this rank."""

    memory: memoryview | None = None
    """Memory of the snapshot, laid out as the file that this rank writes."""

    deduplicator: Deduplicator | None = None
    """Deduplicator of the run; None if the run does not deduplicate."""

    host_part: FilePart | None = None
    """This rank's part of the file of its host; None if it writes a file of its own."""

    deletes: bool = True
    """Whether this rank deletes the attempt if the save fails. Rank 0 does so in a folder that all
    ranks share, otherwise one rank on each host."""

    @property
    def file_nbytes(self) -> int:
        """Bytes of the file that this rank creates; 0 if it creates none."""
        part = self.host_part
        if part is None:
            return self.file_layout.nbytes
        return part.nbytes if part.leads else 0

    def windows_of(self, item: TensorItem) -> Iterable[memoryview]:
        """Return the bytes of an item, as `write` takes them."""
        return host_windows(self.tensor_of(item), item.dtype)

    def data_of(self, item: TensorItem, box: Region) -> memoryview:
        """Return the bytes of a box of an item, row-major. `box`: relative to the item's region."""
        return host_bytes(box_of(self.tensor_of(item), box), item.dtype)


Begin = Callable[[int], HiddenFolder]
"""Function that makes an attempt, given the number of bytes to save."""

CommitBy = Callable[[Pending, WriteResult | HoldfastError, Ranks], int]
"""Function that publishes a save, given the rank's write result. Returns the checkpoint's bytes."""


def begin_save(
    catalog: Catalog,
    name: str,
    state: FlatState,
    *,
    planner: Planner,
    facts: Manifest | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = True,
    deduplicator: Deduplicator | None = None,
    begin: Begin | None = None,
) -> Pending:
    """Plan the save of a state as the checkpoint `name` of `catalog`, and make the attempt folder.

    `facts`: manifest without entries and files. This function adds the number of ranks and the
        versions of the software. The facts of rank 0 are stored.
    `dtype`: dtype in which floating-point tensors are stored; None for their own.
    `overwrite`: replace the checkpoint that has the name now.
    `deduplicator`: links files of an earlier checkpoint whose tensors have not changed.
    `begin`: function that makes the attempt on rank 0, given the bytes of all files.

    Collective: every rank calls this, and then `finish_save` or `abort`. An error of one rank is
    raised on all.
    """
    spans = Spans()
    begin = begin or partial(_begin_attempt, catalog, name, overwrite)
    with spans("plan"):
        begun = None
        while begun is None:
            held = planner.agree(capture(lambda: planner.hold(state, dtype)))
            # A save that can link files writes less. It checks the free space once it knows how
            # much it writes.
            is_full = deduplicator is None or not deduplicator.can_link(name)
            begun = _begin_if_alike(held, begin, planner=planner, is_full=is_full)
    file_layout, attempt = begun
    layout = {"world_size": planner.ranks.size}
    return Pending(
        catalog,
        attempt,
        file_layout,
        held=held,
        tensor_of=held.training_tensor,
        index=planner.index,
        facts=replace(facts or Manifest({}, {}), layout=layout, versions=software_versions()),
        spans=spans,
        replicas=planner.replicas(held),
        stepped=planner.stepped,
        devices=accelerator.devices_of(held.tensors.values()),
        deduplicator=deduplicator,
        host_part=planner.host_part(file_layout),
        deletes=planner.ranks.rank == 0,
    )


def _begin_if_alike(
    held: LocalState, begin: Begin, *, planner: Planner, is_full: bool
) -> tuple[FileLayout, HiddenFolder] | None:
    """Make the attempt, if shared tensors and values are equal on all ranks that hold them.
    `is_full`: whether the save writes all bytes, so that the free space is checked for them.

    If some differ, log their names, let the next plan store the first rank's version, and return
    None. Tensors that only optimizers change are not compared here, because that takes longer:
    `commit` compares them, and a difference is an error there.

    Collective.
    """
    ranks = planner.ranks
    local = capture(lambda: (planner.file_layout(held), planner.digests(held)))
    outcome: HoldfastError | tuple[int, dict[int, int]]
    if isinstance(local, HoldfastError):
        outcome = local
    else:
        outcome = local[0].nbytes if is_full else 0, local[1].by_group()

    def begin_or_differ(everyone: list[tuple[int, dict[int, int]]]) -> HiddenFolder | list[int]:
        differ = groups_that_differ([digests for _, digests in everyone])
        return differ or begin(sum(nbytes for nbytes, _ in everyone))

    begun = gather_and_run(ranks, outcome, begin_or_differ)
    assert not isinstance(local, HoldfastError)
    file_layout, digests = local
    if isinstance(begun, HiddenFolder):
        return file_layout, begun
    differ = gather_and_run(ranks, digests.of(begun), names_that_differ)
    planner.keep_first(differ)
    for entry, (first, other) in differ.items() if ranks.rank == 0 else ():
        logger.warning(
            "`%s` differs between ranks %d and %d: the version of the first rank that holds it is "
            "kept. State of one rank alone needs a key of its own, such as `rank_%d`",
            entry,
            first,
            other,
            other,
        )
    return None


def _begin_attempt(catalog: Catalog, name: str, overwrite: bool, nbytes: int) -> HiddenFolder:
    check_space(catalog, name, nbytes)
    return catalog.begin(name, replace=overwrite)


def check_space(catalog: Catalog, name: str, nbytes: int) -> None:
    """Raise StorageError if checkpoint `name` needs more bytes than are free."""
    free = catalog.store.free_bytes()
    if free is not None and nbytes > free:
        raise StorageError(
            f"`{catalog.where(name)}` needs {spelled_bytes(nbytes)}, "
            f"{spelled_bytes(free)} are free",
            hint=NO_SPACE,
        )


@cache
def software_versions() -> dict[str, str]:
    """Return the versions of the software that saves, for the manifest."""
    return {
        "holdfast": installed_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def take_snapshot(
    pending: Pending,
    snapshot: Snapshot,
    ranks: Ranks,
    *,
    now: Sequence[TensorItem],
    later: Sequence[TensorItem],
) -> tuple[Pending, Staging]:
    """Copy the items of `now` into the snapshot. Returns the save, which now reads the snapshot,
    and the copy of the items of `later`, which the caller must run.

    After this returns, training may change the tensors of `now`. It may change those of `later`
    after `Staging.wait`; if one of them has changed by then, the copy fails. `now` and `later`
    together must be all items of the file, and `later` may contain only tensors of
    `Pending.stepped`. The snapshot must have room for them.

    Collective.
    """

    def copy(items: Sequence[TensorItem], tensor_of: TensorOf, *, is_last: bool) -> None:
        snapshot.copy(items, tensor_of)
        if is_last:
            # Take the digests now: training may change the tensors next, and then the digests would
            # not match the copy.
            pending.replicas.take()

    with pending.spans("stage"):
        try:
            run_on_all(ranks, lambda: copy(now, pending.tensor_of, is_last=not later))
        except HoldfastError:
            abort(pending)
            raise
    check = pending.held.change_check(pending.stepped) if later else None
    # A tensor may get other memory before it is copied: an RNN moves its weights in its forward.
    views = {item.offset: pending.tensor_of(item) for item in later}

    def copy_later() -> None:
        copy(later, lambda item: views[item.offset], is_last=bool(later))
        if check is not None:
            check.run()

    staging = Staging(copy_later, pending.devices)
    memory = snapshot.memory(pending.file_layout.nbytes)
    return replace(pending, tensor_of=snapshot.tensor_of, memory=memory), staging


def abort(pending: Pending) -> None:
    """Abort a save that has begun."""
    if pending.deletes:
        pending.catalog.abort(pending.attempt)


def finish_save(
    pending: Pending,
    ranks: Ranks,
    *,
    staging: Staging | None = None,
    bytes_per_s: float | None = None,
    commit_by: CommitBy | None = None,
) -> Saved:
    """Finish the copy to the snapshot, if there is one, write the file and publish the checkpoint.

    `staging`: the copy to finish. With it, call this in a separate thread.
    `bytes_per_s`: limit on the bytes that this rank writes per second.
    `commit_by`: collective function that replaces `commit`.

    Collective: nothing else may use `ranks` until this returns.
    """
    catalog, attempt, spans = pending.catalog, pending.attempt, pending.spans
    written = _stage_and_write(pending, ranks, staging, bytes_per_s)
    if isinstance(written, WriteResult):
        written = replace(written, seconds=dict(spans.seconds))
    with spans("commit"):
        if commit_by is not None:
            nbytes, shared_nbytes = commit_by(pending, written, ranks), 0
        else:
            nbytes, shared_nbytes = commit(
                attempt,
                written,
                index=pending.index,
                facts=pending.facts,
                digests=pending.replicas.digests,
                catalog=catalog,
                ranks=ranks,
            )
    if pending.deduplicator is not None:
        pending.deduplicator.published(attempt.name)
    return Saved(catalog.where(attempt.name), nbytes, spans, shared_nbytes)


def _stage_and_write(
    pending: Pending, ranks: Ranks, staging: Staging | None, bytes_per_s: float | None
) -> WriteResult | HoldfastError:
    """Finish the copy to the snapshot, and write this rank's files. Returns the result, or the
    error, for the commit. If ranks write one file together, an error of one of them is raised on
    all."""
    store = pending.catalog.store

    def stage() -> None:
        if staging is not None:
            with pending.spans("stage"):
                staging.run()
            # Do this only after the copy, since optimizers wait for the copy.
            lower_priority()
        if pending.index is not None and pending.deduplicator is None:
            # Encode in parallel with the write. If this fails, `commit` tries again, and raises the
            # error.
            encode = partial(capture, pending.index.encoded)
            threading.Thread(target=encode, name="holdfast-index", daemon=True).start()

    def write_to(target: Creating) -> WriteResult:
        # There are no tensors left if the digests were taken with the copy of a snapshot.
        needs_digests = bool(pending.replicas.tensors)
        with _in_parallel(pending) if needs_digests else nullcontext():
            return _write(pending, target, Pace(bytes_per_s))

    def stage_and_write() -> WriteResult:
        stage()
        return write_to(store)

    part = pending.host_part
    if part is None:
        return capture(stage_and_write)
    try:
        return write_together(
            store,
            str(pending.attempt),
            pending.file_layout,
            part,
            before=stage,
            write_part=write_to,
            spans=pending.spans,
            ranks=ranks,
        )
    except HoldfastError:
        abort(pending)
        raise


def _write(pending: Pending, target: Creating, pace: Pace) -> WriteResult:
    """Write this rank's file to `target`. A deduplicator links files, and writes only the rest."""
    spans = pending.spans
    if pending.deduplicator is not None:
        return pending.deduplicator.write(
            pending.attempt,
            pending.file_layout,
            pending.windows_of,
            check_space=partial(check_space, pending.catalog, pending.attempt.name),
            pace=pace,
            spans=spans,
        )
    data = pending.windows_of if pending.memory is None else pending.memory
    return write(target, str(pending.attempt), pending.file_layout, data, pace, spans)


@contextmanager
def _in_parallel(pending: Pending) -> Iterator[None]:
    """Context for the write of a file: meanwhile a thread computes the digests, since the write
    mostly waits for the disk. Raises the error of the thread on exit."""
    queued = accelerator.QueuedWork(pending.devices)
    outcome: list[HoldfastError | None] = []

    def take() -> None:
        with queued.followed():
            pending.replicas.take()

    thread = threading.Thread(target=lambda: outcome.append(capture(take)), name="holdfast-hash")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if outcome[0] is not None:
        raise outcome[0]
