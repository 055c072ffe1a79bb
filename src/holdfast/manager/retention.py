"""Letting old steps go: their names at once, their files in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import Action, execute, plan_cleanup, plan_removals
from holdfast.comm import capture
from holdfast.errors import HoldfastError
from holdfast.format.names import step_name
from holdfast.manager.policy import Retention, removable
from holdfast.manager.resume import CachedIndex, good_steps
from holdfast.storage.store import Store

logger: logging.Logger = logging.getLogger("holdfast")


def put_in_order(store: Store) -> None:
    """Sweep what killed runs have left, and say what was done. Nobody else may be saving there."""
    actions = plan_cleanup(store.list())
    for action in actions:
        logger.info("%s %s: %s", action.verb, action.folder, action.why)
    for problem in execute(store, actions):
        logger.warning("%s; the next start tries again", problem)


class Retainer:
    """Keeps what the rules keep. On rank 0 alone: nobody waits for it, and what goes wrong is
    reported and tried again after the next save."""

    def __init__(self, catalog: Catalog, retention: Retention) -> None:
        self._catalog, self._retention = catalog, retention
        self._resumed_from: int | None = None
        self._left_behind: set[int] = set()
        self._looked: dict[str, CachedIndex] = {}
        self._thread: threading.Thread | None = None

    def resumed(self, step: int, left_behind: Collection[int]) -> None:
        """Never remove the step that the run stands on, nor newer ones of a course it has left."""
        self._resumed_from, self._left_behind = step, set(left_behind)

    def saved(self, step: int) -> None:
        """Let go of what need not stay now that `step` is published. The files are deleted in the
        background: see `wait`."""
        self._left_behind.discard(step)
        found = capture(lambda: self._removable(step))
        if isinstance(found, HoldfastError):
            logger.warning("could not look for steps to remove: %s", found)
        for old in [] if isinstance(found, HoldfastError) else found:
            try:
                self._catalog.let_go(step_name(old))
                logger.info("removed step %d: no rule keeps it", old)
            except HoldfastError as error:
                logger.warning(
                    "could not remove old steps: %s; the next save tries again", error.what
                )
        self._delete()

    def wait(self) -> None:
        """Return once all that was let go is deleted, or reported."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _removable(self, current: int) -> list[int]:
        keep = self._retention.latest_k
        ours = {s: f for s, f in self._catalog.folders().items() if s not in self._left_behind}
        if keep == 0 or len(ours) <= keep:
            return []  # Whichever of them are good: none can go, so none is looked into.
        good = good_steps(self._catalog, ours, self._looked)
        protected = () if self._resumed_from is None else (self._resumed_from,)
        return removable(good, self._retention, current=current, protected=protected)

    def _delete(self) -> None:
        """Also what an earlier attempt could not delete."""
        self.wait()
        found = capture(lambda: plan_removals(self._catalog.store.list()))
        if isinstance(found, HoldfastError):
            logger.warning("could not look for what to delete: %s", found.what)
        elif found:
            # Whatever is left when the process ends is swept by the next start.
            self._thread = threading.Thread(
                target=self._execute, args=(found,), name="holdfast-remove", daemon=True
            )
            self._thread.start()

    def _execute(self, actions: list[Action]) -> None:
        failed = capture(lambda: execute(self._catalog.store, actions))
        for problem in [failed.what] if isinstance(failed, HoldfastError) else failed:
            logger.warning("%s; the next save tries again", problem)
