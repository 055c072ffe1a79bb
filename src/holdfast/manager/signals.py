"""Signals that ask a run to stop: noted when they come, acted on at the next step boundary."""

from __future__ import annotations

import signal
import threading
import time
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


class StopSignals:
    """Notes the first of the given signals. A second one then acts as it would have without this:
    nobody has to wait for a process that is to go at once."""

    def __init__(self, names: Sequence[str]) -> None:
        """Take over the signals; outside of the main thread, where that cannot be done, none."""
        self._number = 0
        self._received_s = 0.0
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in names:
                number = signal.Signals[name]
                self._before[number] = signal.signal(number, self._note)

    def received(self) -> tuple[float, float]:
        """Number of the signal that came, and the seconds since; zeros while there is none."""
        return self._number, time.monotonic() - self._received_s if self._number else 0.0

    def release(self) -> None:
        """Give the signals back. Further calls do nothing."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._number, self._received_s = number, time.monotonic()
        self.release()
