"""Folders of checkpoints, each read again and again in its own thread."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from holdfast.dashboard.history import History, HistoryReader
from holdfast.errors import HoldfastError

READ_S = 2.0
"""Least seconds between two reads."""

READ_SHARE = 0.05
"""Largest share of a thread's time for reading, so slow folders are read more rarely."""

FIRST_READ_S = 1.0
"""Seconds to wait for the first read."""


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Result of reading a folder once."""

    history: History | None
    problem: str | None = None
    """Reason why there is no history."""

    time: float = 0.0
    """Time of the read, in seconds since 1970."""


class WatchedFolder:
    """A folder that is read until the process ends. One that hangs or fails delays no other."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.latest = ReadResult(None, "not read yet")
        """Result of the latest read."""
        self._reader = HistoryReader(folder)
        first = threading.Event()
        threading.Thread(target=self._run, args=(first,), name="holdfast-look", daemon=True).start()
        first.wait(FIRST_READ_S)

    def _run(self, first: threading.Event) -> None:
        while True:
            started = time.monotonic()
            self.latest = self._read()
            first.set()
            time.sleep(max(READ_S, (time.monotonic() - started) / READ_SHARE))

    def _read(self) -> ReadResult:
        try:
            return ReadResult(self._reader.read(), time=time.time())
        except HoldfastError as error:
            return ReadResult(None, error.what, time.time())
        except Exception as error:  # noqa: BLE001 - the next read may succeed
            return ReadResult(None, f"{type(error).__name__}: {error}", time.time())
