"""Where time goes: the one seam for timing and counts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median


@dataclass(slots=True)
class Spans:
    """Seconds spent in each stage of one operation, in the order of the first entry."""

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
class Spread:
    """Seconds of one stage over all ranks."""

    least: float
    median: float
    most: float
    slowest: int
    """The rank that took the most."""


@dataclass(frozen=True, slots=True)
class SaveTimes:
    """How long a save took, from its plan until it was durable."""

    step: int
    nbytes: int
    seconds: float
    """Of the rank that took the longest."""

    stages: Mapping[str, Spread]


def save_times(step: int, nbytes: int, ranks: Sequence[Mapping[str, float]]) -> SaveTimes:
    """How long a save took, from the seconds of each stage that every rank has measured.

    >>> save_times(1, 8, [{"write": 2.0}, {"write": 5.0}, {"write": 3.0}]).stages["write"]
    Spread(least=2.0, median=3.0, most=5.0, slowest=1)
    """
    stages = {}
    for stage in dict.fromkeys(stage for seconds in ranks for stage in seconds):
        spent = [seconds.get(stage, 0.0) for seconds in ranks]
        most = max(spent)
        stages[stage] = Spread(min(spent), median(spent), most, spent.index(most))
    return SaveTimes(step, nbytes, max(sum(seconds.values()) for seconds in ranks), stages)


def rate(nbytes: int, seconds: float) -> str:
    """How much, how long, how fast.

    >>> rate(2_500_000, 0.5)
    '2.5 MB in 0.50 s (5.0 MB/s)'
    """
    return f"{amount(nbytes)} in {seconds:.2f} s ({amount(nbytes / max(seconds, 1e-9))}/s)"


def amount(nbytes: float) -> str:
    """Bytes for people.

    >>> amount(999), amount(1500), amount(2.2e9)
    ('999 B', '1.5 kB', '2.2 GB')
    """
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if nbytes < 1000:
            break
        nbytes, unit = nbytes / 1000, larger
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
