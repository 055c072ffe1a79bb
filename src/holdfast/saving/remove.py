"""Delete old checkpoints: take their names away at once, and delete their files in a thread."""

from __future__ import annotations

import logging
import threading

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import Action, execute, plan_cleanup
from holdfast.errors import HoldfastError
from holdfast.failures import tried
from holdfast.format.names import step_name

logger: logging.Logger = logging.getLogger("holdfast")


class Remover:
    """Deletes checkpoints of one catalog. It logs errors, and the next save tries again."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._thread: threading.Thread | None = None
        self._kept: dict[int, str] = {}
        """Reason that was logged last for each step that could not be deleted."""

        self._due: int | None = None
        """Step among these that is tried again: one after each save, in turn, since looking into
        all of them would take longer from save to save."""

    def set_aside(self, step: int) -> bool:
        """Take the name of the checkpoint of a step away, so that readers no longer find it.
        `start` deletes its files. Returns whether the name was taken away. A reason against it is
        logged once, and the step is tried again after later saves."""
        if step in self._kept and step != self._due:
            return False
        try:
            self._catalog.set_aside_for_deletion(step_name(step))
        except HoldfastError as error:
            if self._kept.get(step) != error.what:
                logger.warning(
                    "could not delete step %d: %s; the next save tries again", step, error.what
                )
            self._kept[step] = error.what
            return False
        self._kept.pop(step, None)
        return True

    def start(self) -> None:
        """Start a thread that deletes the files of all checkpoints whose names were taken away,
        also the files that an earlier try could not delete."""
        self.wait()
        steps = sorted(self._kept)
        self._due = next((n for n in steps if n > (self._due or 0)), steps[0] if steps else None)
        found = tried(lambda: plan_cleanup(self._catalog.store.list()))
        if isinstance(found, HoldfastError):
            logger.warning("could not look for files to delete: %s", found.what)
        # Execute only deletions: the other actions need a folder that no process saves to.
        elif deletions := [action for action in found if action.role == "removing"]:
            # If the process ends before the thread is done, the next start deletes the rest.
            self._thread = threading.Thread(
                target=self._execute, args=(deletions,), name="holdfast-remove", daemon=True
            )
            self._thread.start()

    def wait(self) -> None:
        """Wait until the files are deleted, or the errors are logged."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _execute(self, actions: list[Action]) -> None:
        failed = tried(lambda: execute(self._catalog.store, actions))
        for problem in [failed.what] if isinstance(failed, HoldfastError) else failed:
            logger.warning("%s; the next save tries again", problem)
