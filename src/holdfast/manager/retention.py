"""Deletes old checkpoints: takes their names away at once, and deletes their files in a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from contextlib import suppress

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import Action, execute, plan_cleanup
from holdfast.comm import capture
from holdfast.errors import HoldfastError
from holdfast.format.names import step_name
from holdfast.manager.complete import CompleteCheckpoints
from holdfast.manager.policy import Retention, removable
from holdfast.manager.resume import good_steps

logger: logging.Logger = logging.getLogger("holdfast")


class Retainer:
    """Applies the retention rules after each save, on rank 0.

    Training does not wait for it. It logs errors, and tries again after the next save.
    """

    def __init__(self, catalog: Catalog, retention: Retention) -> None:
        self._catalog, self._retention = catalog, retention
        self._resumed_from: int | None = None
        self._left_behind: set[int] = set()
        self._complete = CompleteCheckpoints(catalog.store)
        self._thread: threading.Thread | None = None

    def resumed(self, step: int, left_behind: Collection[int]) -> None:
        """Protect the step that the run resumed from, and newer steps of a branch that it left."""
        self._resumed_from, self._left_behind = step, set(left_behind)

    def saved(self, step: int) -> None:
        """Apply the rules, now that `step` is published. Deletes files in the background: see
        `wait`."""
        self._left_behind.discard(step)
        found = capture(lambda: self._removable(step))
        if isinstance(found, HoldfastError):
            logger.warning("could not look for checkpoints to delete: %s", found)
        for old in [] if isinstance(found, HoldfastError) else found:
            try:
                self._catalog.set_aside_for_deletion(step_name(old))
                logger.info("deleted step %d: no rule keeps it", old)
            except HoldfastError as error:
                logger.warning(
                    "could not delete step %d: %s; the next save tries again", old, error.what
                )
        self._delete()

    def wait(self) -> None:
        """Wait until the files are deleted, or the errors are logged."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _removable(self, current: int) -> list[int]:
        with suppress(HoldfastError):  # Then it is opened below, as any other.
            self._complete.published(step_name(current))
        keep = self._retention.latest_k
        ours = {s: f for s, f in self._catalog.folders().items() if s not in self._left_behind}
        if keep == 0 or len(ours) <= keep:
            return []  # All are kept, whether they are good or not, so none need be opened.
        good = good_steps(self._catalog, ours, self._complete)
        protected = () if self._resumed_from is None else (self._resumed_from,)
        return removable(good, self._retention, current=current, protected=protected)

    def _delete(self) -> None:
        """Start to delete the files, also those that an earlier try could not delete."""
        self.wait()
        found = capture(lambda: plan_cleanup(self._catalog.store.list()))
        if isinstance(found, HoldfastError):
            logger.warning("could not look for files to delete: %s", found.what)
        # The other actions may be executed only while no process saves to this folder.
        elif deletions := [action for action in found if action.role == "removing"]:
            # If the process ends before the thread is done, the next start deletes the rest.
            self._thread = threading.Thread(
                target=self._execute, args=(deletions,), name="holdfast-remove", daemon=True
            )
            self._thread.start()

    def _execute(self, actions: list[Action]) -> None:
        failed = capture(lambda: execute(self._catalog.store, actions))
        for problem in [failed.what] if isinstance(failed, HoldfastError) else failed:
            logger.warning("%s; the next save tries again", problem)
