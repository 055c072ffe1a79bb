"""Finish saves in a thread while training continues."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from holdfast.comm import capture
from holdfast.errors import HoldfastError

NICENESS = 5
"""Niceness added to a thread that writes, so that training threads run first."""

_START_S_MAX = 1.0
"""Longest wait for a started thread to begin, in seconds."""


class Background:
    """Thread that finishes one save at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: HoldfastError | None = None
        self._waits_at_exit = False

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a save has failed, and `wait` has not raised its error yet."""
        return self._error is not None

    def start(self, work: Callable[[], object]) -> None:
        """Wait for the previous work, then run `work` in a thread."""
        self._join()
        self._wait_at_exit()

        def run() -> None:
            outcome = capture(work)
            if isinstance(outcome, HoldfastError):
                self._error = outcome

        self._thread = threading.Thread(target=run, name="holdfast-save")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the work is done. Raise its error, unless an earlier call has raised it."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def is_started(self) -> bool:
        """Whether the thread runs or has run. False if an interrupt came before it began."""
        thread, waited_s = self._thread, 0.0
        # If an interrupt came during `Thread.start`, the thread may begin some milliseconds later.
        while thread is not None and thread.ident is None and waited_s < _START_S_MAX:
            time.sleep(0.01)
            waited_s += 0.01
        return thread is not None and thread.ident is not None

    def _wait_at_exit(self) -> None:
        """Let the end of the program wait for the thread, whose store may use pools."""
        if self._waits_at_exit:
            return
        self._waits_at_exit = True
        join = weakref.WeakMethod(self._join)

        def wait() -> None:
            if (alive := join()) is not None:
                alive()

        # While the program ends, nothing can be registered any more.
        with suppress(RuntimeError):
            before_pools_close(wait)

    def _join(self) -> None:
        if self._thread is not None:
            if self.is_started():
                self._thread.join()
            self._thread = None


def before_pools_close(work: Callable[[], object]) -> None:
    """Call `work` at the end of the program, while pools of threads still take work.

    `concurrent.futures` closes all pools by such a function, and the last one registered runs
    first. `atexit` and the end of a non-daemon thread come too late.
    """
    threading._register_atexit(work)  # type: ignore[attr-defined]


def lower_priority() -> None:
    """Lower the priority of this thread, and of the threads that it starts."""
    # Only Linux has a niceness per thread. Elsewhere the save runs at normal priority.
    with suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, niceness + NICENESS)
