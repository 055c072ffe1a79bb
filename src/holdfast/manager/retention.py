"""Applies the retention rules: decides which checkpoints to delete, and deletes them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress

from holdfast.catalog.catalog import Catalog
from holdfast.errors import HoldfastError
from holdfast.failures import tried
from holdfast.format.names import step_name
from holdfast.manager.complete import CompleteCheckpoints
from holdfast.manager.policy import Retention, removable
from holdfast.manager.resume import good_steps
from holdfast.saving.remove import Remover

logger: logging.Logger = logging.getLogger("holdfast")


class Retainer:
    """Applies the retention rules after each save, on rank 0.

    Training does not wait for the deletions. Errors are logged, and the next save tries again.
    """

    def __init__(self, catalog: Catalog, retention: Retention) -> None:
        self._catalog, self._retention = catalog, retention
        self._resumed_from: int | None = None
        self._left_behind: set[int] = set()
        self._complete = CompleteCheckpoints(catalog.store)
        self._remover = Remover(catalog)

    def resumed(self, step: int, left_behind: Collection[int]) -> None:
        """Protect the step that the run resumed from, and the newer steps (`left_behind`) that the
        run abandoned when it went back to that step."""
        self._resumed_from, self._left_behind = step, set(left_behind)

    def saved(self, step: int) -> None:
        """Apply the rules after the checkpoint of `step` was published. The files of deleted
        checkpoints are removed in the background: see `wait`."""
        self._left_behind.discard(step)
        found = tried(lambda: self._removable(step))
        if isinstance(found, HoldfastError):
            logger.warning("could not look for checkpoints to delete: %s", found)
        for old in [] if isinstance(found, HoldfastError) else found:
            if self._remover.set_aside(old):
                logger.info("deleted step %d: no rule keeps it", old)
        self._remover.start()

    def wait(self) -> None:
        """Wait until all files of deleted checkpoints are removed, or the errors are logged."""
        self._remover.wait()

    def _removable(self, current: int) -> list[int]:
        with suppress(HoldfastError):  # If this fails, `good_steps` opens the checkpoint again.
            self._complete.published(step_name(current))
        keep = self._retention.latest_k
        ours = {s: f for s, f in self._catalog.folders().items() if s not in self._left_behind}
        if keep == 0 or len(ours) <= keep:
            return []  # All are kept, good or not, so there is no need to open any.
        good = good_steps(self._catalog, ours, self._complete)
        protected = () if self._resumed_from is None else (self._resumed_from,)
        return removable(good, self._retention, current=current, protected=protected)
