"""Signals that ask a run to stop: noted when they come, acted on at the next step boundary."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any

from holdfast.errors import UsageError


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError where one of these is no signal that can be waited for."""
    for name in names:
        number = getattr(signal, name, None)
        refused = (signal.SIGKILL, signal.SIGSTOP)
        if not isinstance(number, signal.Signals) or number in refused:
            raise UsageError(
                f"`checkpoint.stop_signals` names `{name}`, which cannot be waited for",
                hint="SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU, ...",
            )


REPEATED_S = 1.0
"""Signals that come within this time of the first are the same one, sent once to the process and
once by whoever started it."""


class StopSignals:
    """Notes the first of the given signals, and ends the process at once with a second one.

    A thread hears of them by a pipe at the moment in which they come. The main thread would only
    hear of them after the collective or the copy that it waits for, which may take longer than
    there is time.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Take over the signals; outside of the main thread, where that cannot be done, none."""
        self._number = 0
        self._received_s = 0.0
        self._before: dict[signal.Signals, Any] = {}
        if not names or threading.current_thread() is not threading.main_thread():
            return
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        self._wakeup_before = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        ours = frozenset(int(signal.Signals[name]) for name in names)
        self._thread = threading.Thread(
            target=self._listen, args=(ours,), name="holdfast-signals", daemon=True
        )
        self._thread.start()
        for number in ours:
            self._before[signal.Signals(number)] = signal.signal(number, self._note)
        leave = weakref.WeakMethod(self._leave)
        os.register_at_fork(after_in_child=lambda: (leave() or _do_nothing)())

    def received(self) -> tuple[float, float]:
        """Number of the signal that came, and the seconds since; zeros while there is none."""
        return self._number, time.monotonic() - self._received_s if self._number else 0.0

    def release(self) -> None:
        """Give the signals back. Further calls do nothing."""
        if self._before:
            self._give_back(self._wakeup_before)
            os.close(self._in)
            self._thread.join()
            os.close(self._out)

    def _leave(self) -> None:
        """In a process forked off, such as a worker that loads data: its signals are not ours."""
        if self._before:
            self._give_back(-1)

    def _give_back(self, wakeup: int) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        signal.set_wakeup_fd(wakeup)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._number:
            self._received_s = time.monotonic()
            self._number = number

    def _listen(self, ours: frozenset[int]) -> None:
        """Returns once the other end of the pipe is closed."""
        while received := os.read(self._out, 1):
            if received[0] not in ours:
                continue
            if self._number and time.monotonic() - self._received_s >= REPEATED_S:
                # Whatever the main thread is in the midst of: what was published stands.
                os._exit(128 + received[0])
            self._note(received[0], None)


def _do_nothing() -> None: ...
