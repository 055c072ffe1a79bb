"""The thread that finishes a save while training goes on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from holdfast.comm import capture
from holdfast.errors import HoldfastError

NICENESS = 5
"""Of a thread that writes, and of those that it starts, beside training's: that comes first."""


def make_way() -> None:
    """Let this thread, and those that it starts, run behind all others of the process."""
    # Linux knows a niceness for each thread; where there is none, nothing is lost.
    with suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, now + NICENESS)


_START_S = 1.0
"""Seconds within which a thread that was started runs."""


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
        """Do `work`, after whatever was started before."""
        self._join()

        def run() -> None:
            outcome = capture(work)
            if isinstance(outcome, HoldfastError):
                self._error = outcome

        self._thread = threading.Thread(target=run, name="holdfast-save")
        self._thread.start()

    def wait(self) -> None:
        """Return once the work that was started is done; raise its error, once."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def is_started(self) -> bool:
        """Whether the thread runs, or has run. An interrupt may come before its start, or during
        it."""
        thread, waited_s = self._thread, 0.0
        while thread is not None and thread.ident is None and waited_s < _START_S:
            time.sleep(0.01)
            waited_s += 0.01
        return thread is not None and thread.ident is not None

    def _join(self) -> None:
        if self._thread is not None:
            if self.is_started():
                self._thread.join()
            self._thread = None
