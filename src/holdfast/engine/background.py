"""The thread that finishes a save while training goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from holdfast.engine.ranks import outcome_of
from holdfast.errors import HoldfastError

NICENESS = 10
"""Of the thread and of those that it starts: training comes first."""


class Background:
    """Finishes one save at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: HoldfastError | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether an error waits to be raised."""
        return self._error is not None

    def start(self, work: Callable[[], object]) -> None:
        """Do `work`; what was started before must have been waited for."""
        assert self._thread is None, "wait first"

        def run() -> None:
            # Linux knows a niceness for each thread, and none for those of another system.
            with suppress(OSError, AttributeError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            outcome = outcome_of(work)
            if isinstance(outcome, HoldfastError):
                self._error = outcome

        self._thread = threading.Thread(target=run, name="holdfast-save")
        self._thread.start()

    def wait(self) -> None:
        """Return once what was started is done; raise its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
