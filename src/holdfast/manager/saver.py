"""One save after the other: in the foreground or the background, with what follows each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

import torch

from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, capture, gather_and_run, run_on_all
from holdfast.errors import HoldfastError, RankError, UsageError
from holdfast.format.manifest import Kind
from holdfast.format.names import step_name
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.goodput import Goodput
from holdfast.manager.hub import Hub, Use
from holdfast.manager.policy import retention_of
from holdfast.manager.retention import Retainer
from holdfast.planning.file_layout import TensorItem
from holdfast.planning.gc_pause import gc_paused
from holdfast.saving.background import Background
from holdfast.saving.planner import Planner
from holdfast.saving.save import Pending, begin_save, discard, finish_save, take_snapshot
from holdfast.saving.stage import Snapshot, Staging, free_memory
from holdfast.spelling import rate, spelled_bytes
from holdfast.state.tree import FlatState
from holdfast.storage.local import NO_SPACE
from holdfast.timing import Spans, times_of

logger: logging.Logger = logging.getLogger("holdfast")

WAIT_SAID_S = 0.1
"""A wait for the background that is shorter is not worth a line in the log."""


Items = tuple[TensorItem, ...]


class Saver:
    """Saves steps into a catalog, one at a time, and lets old ones go.

    Collective: every rank makes one and calls its methods in the same order.
    """

    def __init__(
        self,
        catalog: Catalog,
        config: CheckpointConfig,
        ranks: Ranks,
        sections: Collection[str],
        goodput: Goodput | None = None,
        hub: Hub | None = None,
    ) -> None:
        """`sections` are the top-level names that are not the model's."""
        self._catalog, self._config, self._ranks = catalog, config, ranks
        self._sections = sections
        self._planner = Planner(ranks)
        self._hub = hub or Hub(None, config, catalog, ranks, sections)
        self._in_background = config.async_mode != "disabled"
        # Training's collectives, and those that begin a save, must not meet those of the thread.
        self._finishing_ranks = ranks.duplicate() if self._in_background else ranks
        self._overlapping = config.async_mode == "async_with_pinned_mem"
        self._items: Items | None = None
        self._parted: tuple[Items, Items] = ((), ())
        self._goodput = goodput or Goodput()
        self._background, self._snapshot = Background(), Snapshot()
        self._staging: Staging | None = None
        self.retainer: Retainer = Retainer(catalog, retention_of(config))
        """Lets old steps go; used on rank 0 alone."""
        self.full_save_s: float = 0.0
        """The longest that a full save took until it was durable; 0 before the first."""
        self.model_share: float = 0.0
        """The model's part of a full step's bytes; known to rank 0 alone."""

    @property
    def busy(self) -> bool:
        """Whether a save is being written in the background."""
        return self._background.busy

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed on this rank, which `collect` will raise."""
        return self._background.failed

    def save(
        self,
        step: int,
        kind: Kind,
        flatten: Callable[[], FlatState],
        *,
        dtype: torch.dtype | None = None,
        metrics: Mapping[str, float] | None = None,
        use: Use | None = None,
    ) -> bool:
        """Save a step. Returns whether it was, or is being, saved: see `on_save_error`. `use` is
        what of it is to be a Hugging Face folder."""
        self.collect()
        # What is being deleted would be counted as space that is taken.
        self.retainer.wait()
        pending: Pending | None = None
        try:
            if use in ("beside", "alone"):
                self._hub.prepare()
            with gc_paused():
                pending = begin_save(
                    self._hub.catalog if use == "alone" else self._catalog,
                    step_name(step),
                    run_on_all(self._ranks, flatten),
                    ranks=self._ranks,
                    planner=self._hub.planner if use == "alone" else self._planner,
                    step=step,
                    kind=kind,
                    dtype=dtype,
                    metrics=metrics,
                    model=self._hub.config,
                )
            # A model by itself has nothing beside it, whatever its own names are.
            beside = self._sections if kind == "full" else ()
            pending = replace(pending, facts=replace(pending.facts, components=beside))
            if self._in_background and self._has_room(pending):
                now, later = self._parts_of(pending.file_layout.tensors, pending.stepped)
                staged, staging = take_snapshot(
                    pending, self._snapshot, self._ranks, now=now, later=later
                )
                self._staging = staging
                self._background.start(partial(self._finish_beside, staged, step, use, staging))
                if not later:
                    staging.wait()
            else:
                with gc_paused():
                    self._finish(pending, step, use)
        except HoldfastError as error:
            self._survive(error)
            return False
        except BaseException:
            # An interrupt ends no process where a notebook runs.
            if not self._background.is_started():
                self._staging = None
                if pending is not None:
                    capture(partial(discard, pending, self._ranks))
                self._catalog.release_all()
            raise
        return True

    def wait_for_staging(self) -> None:
        """Return once nothing of the training state is still to be copied."""
        staging = self._staging
        if staging is not None:
            with self._goodput.lost_to("waiting for a copy"):
                staging.wait()
            if self._staging is staging:
                self._staging = None

    def _parts_of(self, items: Items, stepped: frozenset[str]) -> tuple[Items, Items]:
        """Those of a plan that are copied at once, and those that may be while training goes on:
        found out once, for as long as the plan stands."""
        if items is not self._items:
            names = stepped if self._overlapping else frozenset[str]()
            now = tuple(item for item in items if item.name not in names)
            later = tuple(item for item in items if item.name in names)
            self._items, self._parted = items, (now, later)
        return self._parted

    def _has_room(self, pending: Pending) -> bool:
        """Whether every rank has the memory for a snapshot; where not, that is an error, or the
        training waits for this save. Collective."""
        nbytes = pending.file_layout.nbytes
        if nbytes > self._snapshot.nbytes and self._ranks.rank == 0:
            free = free_memory()
            left = "" if free is None else f", {spelled_bytes(free)} free"
            logger.info("needs %s of host memory for snapshots%s", spelled_bytes(nbytes), left)
        try:
            run_on_all(self._ranks, lambda: self._snapshot.reserve(nbytes))
        except UsageError as error:
            if self._config.on_low_memory == "raise":
                discard(pending, self._ranks)
                error.hint = (
                    '`checkpoint.async_mode = "disabled"` needs none; with '
                    '`checkpoint.on_low_memory = "wait"` training waits for saves that do not fit'
                )
                raise
            if self._ranks.rank == 0:
                logger.warning("training waits for this save: %s", error.what)
            return False
        return True

    def collect(self) -> None:
        """Wait for the save in the background, if there is one; raise its error, or survive it."""
        started = time.perf_counter()
        try:
            with self._goodput.lost_to("waiting for the save before"):
                self._background.wait()
        except HoldfastError as error:
            self._survive(error)
        waited_s = time.perf_counter() - started
        if waited_s > WAIT_SAID_S and self._ranks.rank == 0:
            logger.info("waited %.2f s for the save in the background", waited_s)

    def _finish_beside(
        self, pending: Pending, step: int, use: Use | None, staging: Staging
    ) -> None:
        """As `_finish`, in the background. Logs an error at once: a program that makes no further
        call would never learn of it."""
        outcome = capture(lambda: self._finish(pending, step, use, staging))
        if isinstance(outcome, HoldfastError):
            if self._ranks.rank == 0:
                logger.error("step %d was not saved: %s", step, outcome)
            raise outcome

    def _finish(
        self, pending: Pending, step: int, use: Use | None, staging: Staging | None = None
    ) -> None:
        """Write, publish, let old steps go."""
        if use in ("step", "alone"):
            copied = capture(staging.run) if staging is not None else None
            try:
                gather_and_run(self._finishing_ranks, copied, lambda _: None)
            except HoldfastError:
                discard(pending, self._ranks)
                raise
            with pending.spans("write"):
                nbytes = self._hub.finish(pending, self._finishing_ranks, step, use)
            if use == "step":
                self._note(step, nbytes, pending.spans)
                if self._ranks.rank == 0:
                    self.retainer.saved(step)
            return
        limit = self._config.write_bandwidth_limit * 1e6 / self._ranks.size
        ranks = self._finishing_ranks
        saved = finish_save(pending, ranks, staging=staging, bytes_per_s=limit or None)
        self._note(step, saved.nbytes, saved.spans)
        if pending.facts.kind == "full":
            self.full_save_s = max(self.full_save_s, saved.spans.total)
            if pending.index is not None:
                parts = pending.index.encoded().nbytes.items()
                model = sum(nbytes for part, nbytes in parts if part not in self._sections)
                self.model_share = model / max(saved.nbytes, 1)
        if self._ranks.rank == 0:
            done = rate(saved.nbytes, saved.spans.total)
            logger.info("saved step %d: %s, %s", step, done, saved.where)
            self.retainer.saved(step)
        if use == "beside":
            self._hub.finish(pending, self._finishing_ranks, step, use)

    def _note(self, step: int, nbytes: int, spans: Spans) -> None:
        """Remember how long a save has taken. Collective."""
        every = self._finishing_ranks.gather(spans.seconds)
        if every:
            self._goodput.saves.append(times_of(step, nbytes, every))

    def _survive(self, error: HoldfastError) -> None:
        """Go on without what was not saved, if that is wanted and can be."""
        self._goodput.failed_saves += 1
        if error.hint == NO_SPACE:
            error.hint = f"{NO_SPACE}, or lower `checkpoint.keep_latest_k`"
        if self._config.on_save_error == "raise" or isinstance(error, RankError):
            raise error
        if self._ranks.rank == 0:
            logger.warning("a save failed, the run goes on: %s", error)
