"""Folders of steps under the eyes of threads, one each: what they saw last is there at once."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from holdfast.dashboard.history import History, Watch
from holdfast.errors import HoldfastError

LOOK_S = 2.0
"""Between two looks, at least."""

LOOK_SHARE = 0.05
"""Of a thread's time for looking, at most: where a look takes long, there are fewer."""

FIRST_LOOK_S = 1.0
"""How long the first look is waited for."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look has found."""

    history: History | None
    problem: str | None = None
    """Why there is none."""

    time: float = 0.0
    """Of the look, in seconds since 1970."""


class Watched:
    """A folder that is looked at for as long as the process lives. Whatever becomes of the folder,
    one that hangs too, others are not held up."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.seen = Seen(None, "not looked at yet")
        """What the last look has found."""
        self._watch = Watch(folder)
        first = threading.Event()
        threading.Thread(target=self._run, args=(first,), name="holdfast-look", daemon=True).start()
        first.wait(FIRST_LOOK_S)

    def _run(self, first: threading.Event) -> None:
        while True:
            started = time.monotonic()
            self.seen = self._look()
            first.set()
            time.sleep(max(LOOK_S, (time.monotonic() - started) / LOOK_SHARE))

    def _look(self) -> Seen:
        try:
            return Seen(self._watch.look(), time=time.time())
        except HoldfastError as error:
            return Seen(None, error.what, time.time())
        except Exception as error:  # noqa: BLE001 - the next look may find the folder mended
            return Seen(None, f"{type(error).__name__}: {error}", time.time())
