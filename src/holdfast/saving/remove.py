"""Delete old checkpoints: take their names away at once, and delete their files in a thread."""

from __future__ import annotations

import logging
import threading

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import Action, execute, plan_cleanup
from holdfast.comm import capture
from holdfast.errors import HoldfastError
from holdfast.format.names import step_name

logger: logging.Logger = logging.getLogger("holdfast")


class Remover:
    """Deletes checkpoints of one catalog. It logs errors, and the next save tries again."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._thread: threading.Thread | None = None

    def set_aside(self, step: int) -> bool:
        """Take the name of the checkpoint of a step away, so that readers no longer find it.
        `start` deletes its files. Returns whether the name was taken away."""
        try:
            self._catalog.set_aside_for_deletion(step_name(step))
        except HoldfastError as error:
            logger.warning(
                "could not delete step %d: %s; the next save tries again", step, error.what
            )
            return False
        return True

    def start(self) -> None:
        """Start a thread that deletes the files of all checkpoints whose names were taken away,
        also the files that an earlier try could not delete."""
        self.wait()
        found = capture(lambda: plan_cleanup(self._catalog.store.list()))
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
        failed = capture(lambda: execute(self._catalog.store, actions))
        for problem in [failed.what] if isinstance(failed, HoldfastError) else failed:
            logger.warning("%s; the next save tries again", problem)
