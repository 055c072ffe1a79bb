"""Signals that ask a run to stop: noted when they come, acted on at the next step boundary."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from holdfast.errors import UsageError
from holdfast.storage.forks import leave_in_children, no_fork_between


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


_ENDS = b"\0"
"""Written to the pipe to end the thread; no signal has this number."""

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
        self._before: dict[int, Any] = {}
        self._listening = False
        if not names or threading.current_thread() is not threading.main_thread():
            return
        with no_fork_between():
            self._out, self._in = os.pipe()
            self._listening = True
            leave_in_children(self)
        os.set_blocking(self._in, False)
        self._wakeup_before = _Wakeup(signal.set_wakeup_fd(self._in, warn_on_full_buffer=False))
        ours = frozenset(int(signal.Signals[name]) for name in names)
        self._thread = threading.Thread(
            target=self._listen, args=(ours,), name="holdfast-signals", daemon=True
        )
        self._thread.start()
        for number in ours:
            self._before[number] = signal.signal(number, self._note)

    def received(self) -> tuple[float, float]:
        """Number of the signal that came, and the seconds since; zeros while there is none."""
        return self._number, time.monotonic() - self._received_s if self._number else 0.0

    def forget(self) -> None:
        """Forget the signal that came: somebody has acted on it."""
        self._number = 0

    def pass_on(self) -> None:
        """Raise the signal that came, if nobody has acted on it. Call this after `release`."""
        number, self._number = self._number, 0
        if number:
            signal.raise_signal(number)

    def release(self) -> None:
        """Give the signals back. Does nothing when called again, or in a forked child."""
        if not self._listening:
            return
        self._give_back(self._wakeup_before.descriptor)
        # Not by closing the pipe: a child may have a copy of this end, and the thread would wait
        # for as long as that child lives. A pipe that is full wakes the thread as well.
        with suppress(BlockingIOError):
            os.write(self._in, _ENDS)
        self._thread.join()
        os.close(self._in)
        os.close(self._out)

    def leave(self) -> None:
        """In a forked child, such as a worker that loads data: its signals are not ours."""
        if self._listening:
            self._give_back(-1)
            os.close(self._in)
            os.close(self._out)

    def _give_back(self, wakeup: int) -> None:
        self._listening = False
        for number, handler in self._before.items():
            # Another manager may have taken the signals over since: then they are its own.
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        found = signal.set_wakeup_fd(wakeup)
        if found != self._in:
            signal.set_wakeup_fd(found)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._listening:
            self._remember(number)
        else:
            # Given back to this object, after it was released, by a manager that was made later.
            _handle(self._before[number], number, frame)

    def _remember(self, number: int) -> None:
        if not self._number:
            self._received_s = time.monotonic()
            self._number = number

    def _listen(self, ours: frozenset[int]) -> None:
        """Return once the signals have been given back."""
        while self._listening:
            received = os.read(self._out, 1)[0]
            if received not in ours:
                continue
            if self._number and time.monotonic() - self._received_s >= REPEATED_S:
                # Whatever the main thread is in the midst of: what was published stands.
                os._exit(128 + received)
            self._remember(received)


class _Wakeup:
    """A descriptor that signals were written to, if it still is the file that it was."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._file = descriptor, _file_of(descriptor)

    @property
    def descriptor(self) -> int:
        """-1 where the file has been closed: the number may be another file's by now."""
        same = self._file is not None and _file_of(self._descriptor) == self._file
        return self._descriptor if same else -1


def _file_of(descriptor: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _handle(handler: Any, number: int, frame: FrameType | None) -> None:
    """Do what a handler, as `signal.signal` takes it, does."""
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
