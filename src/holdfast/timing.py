"""Measure the time of each stage of a save or a load."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from holdfast.format.timings import DIGITS, Stage, over_ranks


@dataclass(slots=True)
class Spans:
    """Seconds spent in each stage of one operation. `with spans("write"): ...` adds to a stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True, slots=True)
class Times:
    """Duration and size of a save or a load. A save lasts from its plan until it is durable."""

    step: int
    nbytes: int
    """Bytes written or read, over all ranks."""

    seconds: float
    """Seconds of the slowest rank."""

    stages: Mapping[str, Stage]


def times_of(step: int, nbytes: int, ranks: Sequence[Mapping[str, float]]) -> Times:
    """Return the `Times` of a save or a load, given the seconds per stage of each rank.

    >>> times_of(1, 8, [{"plan": 1.0, "write": 2.0}, {"plan": 1.0, "write": 5.0}]).seconds
    6.0
    """
    seconds = max(sum(spent.values()) for spent in ranks)
    return Times(step, nbytes, round(seconds, DIGITS), over_ranks(ranks))
