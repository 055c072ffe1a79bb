"""Measures how much of the wall-clock time goes into training, saving and loading."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from holdfast.comm import Ranks
from holdfast.loading.load import Loaded
from holdfast.manager.policy import Progress
from holdfast.timing import Times, times_of

RESUMING = "resuming"

SAVING_LOCALLY = "saving to the fast tier"


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of the saves and loads since the last call of `CheckpointManager.timings`. Each is
    divided into stages such as `plan` and `write`, and combines all ranks."""

    saves: tuple[Times, ...] = ()
    """Saves that became durable."""

    loads: tuple[Times, ...] = ()

    failed_saves: int = 0
    """Number of saves that failed."""


class Goodput:
    """Counts steps, and the seconds in which the run did not train, by cause.

    `saves`: times of the saves that became durable. The thread of a background save appends to it.
    """

    def __init__(self) -> None:
        self.saves: deque[Times] = deque()
        self.loads: deque[Times] = deque()
        self.failed_saves: int = 0
        self._began = self._saved_at = time.perf_counter()
        self._lost: dict[str, float] = {}
        self._num_steps = self._num_saves = self._steps_at_save = 0

    @contextmanager
    def lost_to(self, cause: str) -> Iterator[None]:
        """Count the time in this context as lost to `cause`. The time in an inner context counts
        only for the cause of that context."""
        started, before = time.perf_counter(), self.lost_s
        try:
            yield
        finally:
            inner = self.lost_s - before
            spent = time.perf_counter() - started - inner
            self._lost[cause] = self._lost.get(cause, 0.0) + spent

    def note_load(self, loaded: Loaded, step: int, ranks: Ranks) -> None:
        """Record the size and duration of a load. `step`: step of the loaded state. Collective."""
        every = ranks.gather((loaded.nbytes, loaded.spans.seconds))
        if every:
            sizes, seconds = zip(*every, strict=True)
            self.loads.append(times_of(step, sum(sizes), seconds))

    @property
    def lost_s(self) -> float:
        """Seconds lost so far, for any cause."""
        return sum(self._lost.values())

    @property
    def blocked_s(self) -> float:
        """Seconds lost to saving so far."""
        return self.lost_s - self._lost.get(RESUMING, 0.0)

    def timings(self) -> Timings:
        """Return the saves and loads that were recorded since the last call of this method."""
        saves, loads = (
            tuple(added.popleft() for _ in range(len(added))) for added in (self.saves, self.loads)
        )
        failed, self.failed_saves = self.failed_saves, 0
        return Timings(saves, loads, failed)

    def count_step(self) -> None:
        """Count one more training step."""
        self._num_steps += 1

    def count_save(self) -> None:
        """Count a save of the step that `count_step` has just counted."""
        self._num_saves += 1
        self._steps_at_save, self._saved_at = self._num_steps, time.perf_counter()

    def progress(self) -> Progress:
        """Return a `Progress` whose first four fields are measured on this rank; others are 0."""
        now = time.perf_counter()
        trained = now - self._began - self.lost_s
        # Without a save, `blocked_s` is only the time in which the run decided that no save is due.
        blocked_s = self.blocked_s - self._lost.get(SAVING_LOCALLY, 0.0)
        save_s = blocked_s / self._num_saves if self._num_saves else 0.0
        return Progress(
            steps=self._num_steps - self._steps_at_save,
            seconds=now - self._saved_at,
            step_s=trained / max(self._num_steps, 1),
            save_s=save_s,
        )

    def report(self) -> str:
        """Return one line on how the time was spent: training, and losses by cause."""
        whole = max(time.perf_counter() - self._began, 1e-9)
        trained = max(whole - self.lost_s, 0.0)
        lost = "".join(f", {spent:.2f} s {cause}" for cause, spent in self._lost.items())
        return f"goodput {100 * trained / whole:.1f}%: {trained:.1f} s training{lost}"
