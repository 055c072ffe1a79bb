"""Records stop signals when they arrive, so that the run can act on them after the next step."""

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
    """Raise a UsageError if one of `names` is not the name of a signal that a process can catch."""
    for name in names:
        number = getattr(signal, name, None)
        if not isinstance(number, signal.Signals) or name in ("SIGKILL", "SIGSTOP"):
            raise UsageError(
                f"`checkpoint.stop_signals` has `{name}`, which is no signal that can be caught",
                hint="SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU, ...",
            )


_END = b"\0"
"""Byte that is sent through the pipe to end the thread. No signal has this number."""

REPEATED_S = 1.0
"""Seconds after the first signal in which further signals count as repetitions of it. A launcher
may pass on a signal that the process has also received directly."""


class StopSignals:
    """Records the first signal that the process receives, of the signals `names`. A second signal
    ends the process at once.

    A thread receives the signals through a pipe as they arrive. A Python handler in the main thread
    would run only after the current collective or copy, which may take longer than the deadline.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Set the handlers of the signals. Do nothing in threads other than the main thread, since
        Python can set handlers only there."""
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
        self._wakeup_before = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        self._wakeup_file = _file_of(self._wakeup_before)
        ours = frozenset(int(signal.Signals[name]) for name in names)
        self._thread = threading.Thread(
            target=self._listen, args=(ours,), name="holdfast-signals", daemon=True
        )
        self._thread.start()
        for number in ours:
            self._before[number] = signal.signal(number, self._handle)

    def received(self) -> tuple[float, float]:
        """Return number and age in seconds of the recorded signal; zeros if there is none."""
        return self._number, time.monotonic() - self._received_s if self._number else 0.0

    def forget(self) -> None:
        """Forget the recorded signal, which has been acted on."""
        self._number = 0

    def pass_on(self) -> None:
        """Send the recorded signal to this process again, unless `forget` was called after a save.

        Call this after `release`, so that the earlier handler gets the signal.
        """
        number, self._number = self._number, 0
        if number:
            signal.raise_signal(number)

    def release(self) -> None:
        """Restore the earlier handlers. Does nothing when called again, or in a forked child."""
        if not self._listening:
            return
        # The wakeup descriptor that was set before ours may be closed by now, and its number may
        # belong to another file.
        is_same = self._wakeup_file and self._wakeup_file == _file_of(self._wakeup_before)
        self._restore(self._wakeup_before if is_same else -1)
        # Closing the pipe would not end the thread, since a forked child may keep this end open.
        # If the pipe is full, the thread wakes up without this byte.
        with suppress(BlockingIOError):
            os.write(self._in, _END)
        self._thread.join()
        os.close(self._in)
        os.close(self._out)

    def leave(self) -> None:
        """Restore the earlier handlers in a forked child, such as a data loader's worker."""
        if self._listening:
            self._restore(-1)
            os.close(self._in)
            os.close(self._out)

    def _restore(self, wakeup: int) -> None:
        self._listening = False
        for number, handler in self._before.items():
            # If a later manager has set its own handler, that handler stays.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        current = signal.set_wakeup_fd(wakeup)
        if current != self._in:
            signal.set_wakeup_fd(current)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._listening:
            self._record(number)
        else:
            # This object was released, but another manager has since restored this method as the
            # handler. Pass the signal to the handler from before this object.
            _call(self._before[number], number, frame)

    def _record(self, number: int) -> None:
        if not self._number:
            self._received_s = time.monotonic()
            self._number = number

    def _listen(self, ours: frozenset[int]) -> None:
        """Record signals until the handlers are restored. A second signal ends the process."""
        while self._listening:
            received = os.read(self._out, 1)[0]
            if received not in ours:
                continue
            if self._number and time.monotonic() - self._received_s >= REPEATED_S:
                # Safe at any moment: published checkpoints are durable.
                os._exit(128 + received)
            self._record(received)


def _file_of(descriptor: int) -> tuple[int, int] | None:
    """Return device and inode number of the open file `descriptor`; None if it is closed."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _call(handler: Any, number: int, frame: FrameType | None) -> None:
    """Do what Python or the system does for a signal with this handler: a function, `SIG_DFL` or
    `SIG_IGN`."""
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
