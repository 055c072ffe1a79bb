"""Statistics, over all ranks, of the time that each stage of a save or a load took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.format.untrusted import count_of, seconds_of

DIGITS = 6
"""Decimal places to which seconds are rounded."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Seconds that the ranks spent in one stage."""

    least: float
    median: float
    most: float
    slowest: int
    """Rank that took the most seconds."""


def over_ranks(ranks: Sequence[Mapping[str, float]]) -> dict[str, Stage]:
    """Return the statistics of each stage, given the seconds per stage of each rank.

    >>> over_ranks([{"write": 2.0}, {"write": 5.0}, {"write": 3.0}])["write"]
    Stage(least=2.0, median=3.0, most=5.0, slowest=1)
    """
    from statistics import median  # Readers of manifests do not need this import.

    stages = {}
    for name in dict.fromkeys(name for seconds in ranks for name in seconds):
        spent = [round(seconds.get(name, 0.0), DIGITS) for seconds in ranks]
        most = max(spent)
        stages[name] = Stage(min(spent), round(median(spent), DIGITS), most, spent.index(most))
    return stages


def decode(stored: Any) -> dict[str, Stage]:
    """Decode the member `timings` of a manifest.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, OverflowError: a stage is invalid.
    """
    return {
        name: Stage(
            seconds_of(stage["least"]),
            seconds_of(stage["median"]),
            seconds_of(stage["most"]),
            count_of(stage["slowest"]),
        )
        for name, stage in stored.items()
    }
