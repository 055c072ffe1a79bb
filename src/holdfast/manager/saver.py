"""Saves one checkpoint at a time, in the foreground or in the background."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch

from holdfast import accelerator
from holdfast.comm import Ranks, capture, gather_and_run, hosts_of, run_on_all
from holdfast.errors import HoldfastError, RankError, StorageError, UsageError
from holdfast.format.manifest import Kind, Manifest
from holdfast.format.names import step_name
from holdfast.manager.context import RunContext
from holdfast.manager.fast_tier import FastTier
from holdfast.manager.hf import Export, HFFormat
from holdfast.manager.lifetime import Lifetime, note_of_process
from holdfast.manager.policy import Retention
from holdfast.manager.retention import Retainer
from holdfast.planning.gc_pause import gc_paused
from holdfast.saving.background import Background
from holdfast.saving.deduplicate import Deduplicator
from holdfast.saving.memory import check_memory, free_memory, threads_to_touch
from holdfast.saving.planner import Planner
from holdfast.saving.save import Pending, abort, begin_save, finish_save, take_snapshot
from holdfast.saving.stage import Snapshot, Staging
from holdfast.spelling import rate, spelled_bytes
from holdfast.state.tree import FlatState
from holdfast.storage.local import NO_SPACE
from holdfast.storage.store import Joining
from holdfast.tier.drain import Drained
from holdfast.tier.local import LocalTier
from holdfast.timing import Spans, times_of

logger: logging.Logger = logging.getLogger("holdfast")

Target = Literal["durable", "local", "drained"]
"""Place that a save goes to. `durable`: the folder of the run. `local`: the fast tier. `drained`:
the fast tier, from which the checkpoint is then copied to the folder of the run."""

AHEAD_SPARE_BYTES = 16 << 20
"""Bytes reserved for snapshots ahead of the first save, in addition to the size of a data file."""

LOGGED_WAIT_S = 0.1
"""Longest wait for the background save that is not logged."""


class Saver:
    """Saves checkpoints one at a time, and applies the retention rules after each.

    Collective: every rank makes one and calls its methods in the same order.
    """

    def __init__(self, run: RunContext, hf: HFFormat | None = None) -> None:
        self._run, self._catalog, self._ranks = run, run.catalog, run.ranks
        self._config, self._goodput = run.config, run.goodput
        self._hf = hf or HFFormat(run, None)
        self._planner = Planner(run.ranks, _hosts_with_files(run))
        self._in_background = run.config.async_mode != "disabled"
        # The background thread's collectives must not mix with those of training and of new saves.
        self._finishing_ranks = run.ranks.duplicate() if self._in_background else run.ranks
        self._overlapping = run.config.async_mode == "async_with_pinned_mem"
        self.background: Background = Background()
        self._snapshot = Snapshot()
        self._staging: Staging | None = None
        self.deduplicator: Deduplicator | None = None
        """Deduplicator of the run; None if the settings do not ask for one."""
        if run.config.deduplicate and run.saves:
            check_every = run.config.deduplicate_check_every
            with _hint_about_links():
                self.deduplicator = Deduplicator(
                    run.catalog, run.ranks.rank, check_every=check_every
                )
        retention = Retention(
            latest_k=run.config.keep_latest_k,
            every_n_steps=run.config.keep_every_n_steps,
            best_k=run.config.keep_best_k,
            best_metric=run.config.keep_best_metric,
            best_mode=run.config.keep_best_mode,
        )
        self.retainer: Retainer = Retainer(run.catalog, retention)
        """Retainer that applies the retention rules; used on rank 0 only."""
        self.tier: FastTier | None = None
        """Fast tier of the run; None before `start_tier` is called."""
        self.owes_durable: bool = False
        """Whether the next step must be saved to the folder of the run, since a save that was to be
        copied there has failed in the fast tier."""
        self._target: Target = "durable"
        """Place that the current or latest save goes to."""
        self.full_save_s: float = 0.0
        """Longest duration of a full save: see `Progress`."""
        self.model_share: float = 0.0
        """Share of the model in a checkpoint: see `Progress`. Known to rank 0 only."""

    def start_tier(self, folder: str, lifetime: Lifetime) -> None:
        """Start the fast tier, in `folder` of each host. Collective."""
        note = note_of_process()
        self.tier = FastTier(self._run, folder, lifetime.held, note, self._drained)

    def save(
        self,
        step: int,
        kind: Kind,
        flatten: Callable[[], FlatState],
        *,
        dtype: torch.dtype | None = None,
        metrics: Mapping[str, float] | None = None,
        export: Export | None = None,
        target: Target = "durable",
    ) -> bool:
        """Save a checkpoint, an export, or both. Returns True if all is saved or being saved.

        `flatten` returns the state to save. `dtype`: dtype in which floating-point tensors are
        stored; None for their own.

        A failure raises an error or returns False: see `on_save_error`. If the fast tier fails and
        the checkpoint was to be copied from there, it is saved to the folder of the run instead.
        """
        if target == "local":
            self.collect()
        else:
            self.settle()
        # Files that are still being deleted take space, which this save may need.
        if target == "durable":
            self.retainer.wait()
        elif self.tier is not None:
            self.tier.local.wait()
        self._target = target
        pending: Pending | None = None
        try:
            if export in ("beside", "alone"):
                self._hf.prepare()
            facts = Manifest(
                tensors={},
                values={},
                step=step,
                kind=kind,
                # A model-only checkpoint has no other components, even if a tensor of the model
                # has the name of one, such as `optimizer`.
                components=tuple(sorted(self._run.others)) if kind == "full" else (),
                metrics=metrics or {},
                model=self._hf.config or {},
            )
            with gc_paused():
                pending = self._begin(step, run_on_all(self._ranks, flatten), facts, dtype, export)
            if self._in_background and self._has_room(pending):
                self._finish_in_background(pending, step, export)
            else:
                with gc_paused():
                    self._finish(pending, step, export)
        except HoldfastError as error:
            if not self._tier_failed(error):
                self._raise_or_log(error)
            elif target == "drained":
                return self.save(step, kind, flatten, dtype=dtype, metrics=metrics, export=export)
            return False
        except BaseException:
            # After an interrupt in a notebook, the process goes on and may save again, so the
            # attempt of this save must not stay.
            if not self.background.is_started():
                self._staging = None
                if pending is not None:
                    capture(partial(abort, pending))
                self._catalog.release_all()
                if self.tier is not None:
                    self.tier.local.catalog.release_all()
            raise
        return True

    def check_links(self) -> None:
        """If `deduplicate` is on, check that the store can link or copy files. Only the holder of
        the folder's lock may call this."""
        if self.deduplicator is not None:
            with _hint_about_links():
                self.deduplicator.check_links()

    def _begin(
        self,
        step: int,
        state: FlatState,
        facts: Manifest,
        dtype: torch.dtype | None,
        export: Export | None,
    ) -> Pending:
        """Plan a save and create its attempt; for the fast tier, create an attempt on each host.
        `facts`: the manifest, without entries and files. Collective."""
        begin = partial(begin_save, facts=facts, dtype=dtype)
        name, local = step_name(step), self._local
        if export == "alone":
            return begin(self._hf.catalog, name, state, planner=self._hf.planner)
        if local is None:
            # A model-only checkpoint shares no files: another program may change its files after
            # the run, and would change those of other checkpoints too.
            deduplicator = self.deduplicator if facts.kind == "full" else None
            begin = partial(begin, deduplicator=deduplicator)
            return begin(self._catalog, name, state, planner=self._planner)
        make = partial(local.attempt, name)
        pending = begin(local.catalog, name, state, planner=self._planner, begin=lambda _: make())
        return local.begin(pending, self._ranks)

    @property
    def _local(self) -> LocalTier | None:
        """Fast tier if the current or latest save goes there, else None."""
        return None if self._target == "durable" or self.tier is None else self.tier.local

    def wait_for_staging(self) -> None:
        """Wait until the state is copied for the latest save, so that training may change it."""
        staging = self._staging
        if staging is not None:
            with self._goodput.lost_to("waiting for a copy"):
                staging.wait()
            if self._staging is staging:
                self._staging = None

    def collect(self) -> None:
        """Wait for the background save, if there is one. Raise its error or log it: see
        `on_save_error`."""
        started = time.perf_counter()
        try:
            with self._goodput.lost_to("waiting for the save before"):
                self.background.wait()
        except HoldfastError as error:
            if self._tier_failed(error):
                self.owes_durable = self._target == "drained"
            else:
                self._raise_or_log(error)
        waited_s = time.perf_counter() - started
        if waited_s > LOGGED_WAIT_S:
            self._run.info(f"waited {waited_s:.2f} s for the save in the background")

    @property
    def draining(self) -> bool:
        """Whether a checkpoint is being copied from the fast tier, or will be once it is saved."""
        will_drain = self._target == "drained" and self.background.busy
        return will_drain or (self.tier is not None and self.tier.drain.busy)

    @property
    def failed(self) -> bool:
        """Whether a background save or a copy has failed, and its error was not raised yet."""
        return self.background.failed or (self.tier is not None and self.tier.drain.failed)

    def settle(self) -> None:
        """Wait for the background save, as `collect` does, then for the copy of a checkpoint from
        the fast tier. Raise errors or log them: see `on_save_error`."""
        self.collect()
        if self.tier is None:
            return
        try:
            with self._goodput.lost_to("waiting for the save before"):
                self.tier.drain.wait()
        except HoldfastError as error:
            self._raise_or_log(error)

    def finish(self) -> None:
        """Wait for all work in the background: saves, copies, deletions, reservations of memory."""
        self.settle()
        self.retainer.wait()
        self._snapshot.wait()
        if self.tier is not None:
            self.tier.local.wait()

    def give_up_drain(self) -> None:
        """Wait for the background save. Then give up the copy of a checkpoint from the fast tier,
        since a stopping run has a deadline."""
        if self.tier is None:
            return
        try:
            # First wait for the background save, which may still start a copy.
            self.collect()
        finally:
            self.tier.drain.stop()

    def _has_room(self, pending: Pending) -> bool:
        """Reserve memory for a snapshot on every rank, and return True. If a host has too little
        memory, raise a UsageError, or return False to let training wait for this save: see
        `on_low_memory`. Collective."""
        try:
            self._reserve(pending.file_layout.nbytes, pending.devices, self._snapshot.reserve)
        except UsageError as error:
            if self._config.on_low_memory == "raise":
                abort(pending)
                error.hint = (
                    '`checkpoint.async_mode = "disabled"` needs none; with '
                    '`checkpoint.on_low_memory = "wait"` training waits for saves that do not fit'
                )
                raise
            self._run.warn(f"training waits for this save: {error.what}")
            return False
        return True

    def reserve_ahead(self, flatten: Callable[[], FlatState]) -> None:
        """Begin to reserve and page-lock memory for snapshots, in a thread of each rank, so that
        the first save blocks training no longer than later ones. Collective."""
        try:
            with gc_paused():
                state = run_on_all(self._ranks, flatten)
                held = self._planner.agree(capture(lambda: self._planner.hold(state, None)))
                layout = run_on_all(self._ranks, lambda: self._planner.file_layout(held))
            devices = accelerator.devices_of(held.tensors.values())
            # Values that are not tensors may have grown by the time of the first save.
            nbytes = layout.nbytes + AHEAD_SPARE_BYTES
            self._reserve(nbytes, devices, self._snapshot.reserve_ahead)
        except RankError:
            raise
        except HoldfastError as error:
            # No error here: the first save tries again, and handles it as `on_low_memory` says.
            self._run.warn(f"no memory for snapshots is reserved ahead: {error}")

    def _reserve(
        self, nbytes: int, devices: Sequence[torch.device], reserve: Callable[..., None]
    ) -> None:
        """Call `reserve`, a method of `Snapshot`, to get memory for snapshots of `nbytes`, unless
        all ranks have enough. `devices`: devices of the tensors.

        Collective. Raises a UsageError on all ranks if one host has too little memory.
        """
        growth = self._snapshot.growth(nbytes, devices)
        if not self._ranks.all_reduce_max([growth])[0]:
            return
        others = _on_same_host(growth, self._ranks)
        if growth:
            free = free_memory()
            left = "" if free is None else f", {spelled_bytes(free)} free"
            kind = "page-locked host memory" if devices else "host memory"
            self._run.info(f"needs {spelled_bytes(nbytes)} of {kind} for snapshots{left}")
        # All ranks check before any of them takes memory that another one counts as free.
        run_on_all(self._ranks, lambda: check_memory(growth, others))
        threads = threads_to_touch(1 + len(others))
        run_on_all(self._ranks, lambda: reserve(nbytes, devices, threads))

    def _finish_in_background(self, pending: Pending, step: int, export: Export | None) -> None:
        """Take a snapshot, and finish the save from it in the background."""
        # Training waits for copies of the tensors in `now`. Only optimizers change the tensors in
        # `later`, so only optimizers wait for those copies.
        items, stepped = pending.file_layout.tensors, pending.stepped
        later = [item for item in items if self._overlapping and item.name in stepped]
        now = [item for item in items if not self._overlapping or item.name not in stepped]
        staged, staging = take_snapshot(pending, self._snapshot, self._ranks, now=now, later=later)
        self._staging = staging

        def finish() -> None:
            outcome = capture(lambda: self._finish(staged, step, export, staging))
            if isinstance(outcome, HoldfastError):
                # Logged now, since the program may end without another call that raises the error.
                if self._ranks.rank == 0:
                    logger.error("step %d was not saved: %s", step, outcome)
                raise outcome

        self.background.start(finish)
        if not later:
            staging.wait()

    def _finish(
        self, pending: Pending, step: int, export: Export | None, staging: Staging | None = None
    ) -> None:
        """Write and publish a save, and apply the retention rules. Then write its export, if any.
        `staging`: copy of tensors into the snapshot, if it is still in progress."""
        if export in ("as_step", "alone"):
            self._finish_export(pending, step, export, staging)
            return
        ranks, local = self._finishing_ranks, self._local
        if local is None:
            saved = finish_save(pending, ranks, staging=staging, bytes_per_s=self._run.bytes_per_s)
            self._record_times(step, saved.written_nbytes, saved.spans)
        else:
            saved = finish_save(pending, ranks, staging=staging, commit_by=local.commit)
        if pending.facts.kind == "full":
            self.full_save_s = max(self.full_save_s, saved.spans.total)
            if pending.index is not None:
                by_name = pending.index.nbytes.items()
                model = sum(nbytes for name, nbytes in by_name if name not in self._run.others)
                self.model_share = model / max(saved.nbytes, 1)
        speed = rate(saved.written_nbytes, saved.spans.total)
        if saved.shared_nbytes:
            speed += f", and {spelled_bytes(saved.shared_nbytes)} shared with an earlier step"
        self._run.info(f"saved step {step}: {speed}, {saved.where}")
        if local is None:
            self._note_durable(step, saved.where, pending.facts.metrics)
        elif self.tier is not None:
            if self._target == "drained":
                self.tier.drain.start(step)
            local.retain(step)
        if export == "beside":
            self._hf.export(pending, ranks, step, export)

    def _finish_export(
        self, pending: Pending, step: int, export: Export, staging: Staging | None
    ) -> None:
        """Write and publish an export of a step that gets no checkpoint: see `Export`."""
        ranks = self._finishing_ranks
        copied = capture(staging.run) if staging is not None else None
        try:
            gather_and_run(ranks, copied, lambda _: None)
        except HoldfastError:
            abort(pending)
            raise
        with pending.spans("write"):
            nbytes = self._hf.export(pending, ranks, step, export)
        if export == "as_step":
            self._record_times(step, nbytes, pending.spans)
            where = self._catalog.where(step_name(step))
            self._note_durable(step, where, pending.facts.metrics)

    def _drained(self, drained: Drained) -> None:
        """Log and record a finished copy from the fast tier. The thread that copies calls this."""
        if drained.times is not None:
            self._goodput.saves.append(drained.times)
            speed = rate(drained.manifest.nbytes, drained.times.seconds)
            self._run.info(f"copied step {drained.step}: {speed}, {drained.where}")
        self._note_durable(drained.step, drained.where, drained.manifest.metrics)

    def _note_durable(self, step: int, where: str, metrics: Mapping[str, float]) -> None:
        if self._ranks.rank == 0:
            self.retainer.saved(step)
        self._run.note_saved(step, where, metrics)

    def _record_times(self, step: int, nbytes: int, spans: Spans) -> None:
        """Record the duration of a save. Collective."""
        seconds = self._finishing_ranks.gather(spans.seconds)
        if seconds:
            self._goodput.saves.append(times_of(step, nbytes, seconds))

    def _tier_failed(self, error: HoldfastError) -> bool:
        """Return whether a disk of the fast tier made the last save fail, for example because it is
        full. If so, log a warning."""
        if self._local is None or not isinstance(error, StorageError):
            return False
        then = "to the folder of the run instead" if self._target == "drained" else "later steps"
        self._run.warn(f"the fast tier failed, the run saves {then}: {error}")
        return True

    def _raise_or_log(self, error: HoldfastError) -> None:
        """Raise the error of a save, or log it: see `on_save_error`. A RankError is always raised,
        since the run cannot continue."""
        self._goodput.failed_saves += 1
        if error.hint == NO_SPACE:
            error.hint = f"{NO_SPACE}, or lower `checkpoint.keep_latest_k`"
        if self._config.on_save_error == "raise" or isinstance(error, RankError):
            raise error
        self._run.warn(f"a save failed, the run goes on: {error}")


def _hosts_with_files(run: RunContext) -> list[str] | None:
    """Return the host of each rank if the ranks of a host write one file together, else None.
    Collective.

    Raises:
        UsageError: in the store of the run, several ranks cannot write one file.
    """
    if run.config.files == "rank" or not run.saves:
        return None
    store = run.catalog.store
    if not isinstance(store, Joining):
        raise UsageError(
            f"`{store.url}` cannot have files that several ranks write, as "
            '`checkpoint.files = "node"` needs: it is not a folder of a file system',
            hint="--checkpoint.files rank",
        )
    return hosts_of(run.ranks)


@contextmanager
def _hint_about_links() -> Iterator[None]:
    """Context that adds a hint to the error of a store that can neither link nor copy files."""
    try:
        yield
    except UsageError as error:
        error.hint = "--checkpoint.no-deduplicate, or a `checkpoint.folder` on another file system"
        raise


def _on_same_host(nbytes: int, ranks: Ranks) -> list[int]:
    """Return the `nbytes` that each of the other ranks on this rank's host passes. Collective."""
    hosts, numbers = hosts_of(ranks), ranks.broadcast(ranks.gather(nbytes))
    places = enumerate(zip(hosts, numbers, strict=True))
    host = hosts[ranks.rank]
    return [number for rank, (h, number) in places if h == host and rank != ranks.rank]
