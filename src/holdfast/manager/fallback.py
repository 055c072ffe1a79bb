"""Resumes on all ranks, and falls back to an older checkpoint if one cannot be loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.steady import LOOKS_MAX, UNREADABLE, fingerprint
from holdfast.comm import Ranks, run_on_rank_0
from holdfast.manager.resume import (
    ResumableStep,
    mark_unless_store_failed,
    newest_resumable,
    open_requested,
)


@dataclass(frozen=True, slots=True)
class Resumer:
    """Resumes a run from its folder. Collective: every rank makes the same calls."""

    catalog: Catalog
    ranks: Ranks
    load: Callable[[ResumableStep, bool], int]
    """`load(checkpoint, explicit)` loads it on all ranks, and returns its step. An error on one
    rank is raised on all. `explicit`: the user has requested this step."""

    warn: Callable[[str], None]
    marks: bool
    """Whether checkpoints that fail to load are marked as damaged."""

    def from_step(self, step: int) -> int:
        """Resume from this step, or raise an error."""
        for left in reversed(range(LOOKS_MAX)):
            checkpoint = run_on_rank_0(self.ranks, partial(open_requested, self.catalog, step))
            try:
                return self.load(checkpoint, True)
            except UNREADABLE:
                if not left or not self._was_replaced(checkpoint):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def from_newest(self) -> tuple[int | None, list[str]]:
        """Resume from the newest checkpoint that loads.

        Returns its step, or None if there is none; and a line on each checkpoint that was passed
        over.
        """
        passed_over: list[str] = []
        below, num_replaced = None, 0
        while True:
            checkpoint, refused = run_on_rank_0(
                self.ranks, partial(newest_resumable, self.catalog, below)
            )
            for line in [line for line in refused if line not in passed_over]:
                self.warn(f"passed over {line}")
                passed_over.append(line)
            if checkpoint is None:
                return None, passed_over
            try:
                return self.load(checkpoint, False), passed_over
            except UNREADABLE as error:
                # The same error is raised on every rank, so all ranks try the same step next.
                num_replaced += 1
                if num_replaced < LOOKS_MAX and self._was_replaced(checkpoint):
                    continue
                passed_over.append(f"step {checkpoint.step}: {error.what}")
                self.warn(f"passed over {passed_over[-1]}")
                if self.ranks.rank == 0 and self.marks:
                    mark_unless_store_failed(self.catalog, checkpoint.step, error)
                below = checkpoint.step

    def _was_replaced(self, checkpoint: ResumableStep) -> bool:
        """Whether another process has replaced or deleted the checkpoint since it was opened."""

        def has_changed() -> bool:
            now = fingerprint(self.catalog.store, checkpoint.folder)
            return now != checkpoint.fingerprint

        return run_on_rank_0(self.ranks, has_changed)
