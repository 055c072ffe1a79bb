"""Where time goes: the one seam for timing and counts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from holdfast.format.timings import DIGITS, Stage, over_ranks


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
class Times:
    """How long a save took, from its plan until it was durable; or a load."""

    step: int
    nbytes: int
    """Over all ranks."""

    seconds: float
    """Of the rank that took the longest."""

    stages: Mapping[str, Stage]


def times_of(step: int, nbytes: int, ranks: Sequence[Mapping[str, float]]) -> Times:
    """How long a save or a load took, from the seconds of each stage that every rank has measured.

    >>> times_of(1, 8, [{"plan": 1.0, "write": 2.0}, {"plan": 1.0, "write": 5.0}]).seconds
    6.0
    """
    seconds = max(sum(spent.values()) for spent in ranks)
    return Times(step, nbytes, round(seconds, DIGITS), over_ranks(ranks))
