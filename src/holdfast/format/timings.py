"""How long each stage of a save or a load took, over all ranks: in a manifest, and in what a run
reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

DIGITS = 6
"""Of a second, after the point."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Seconds of one stage over all ranks."""

    least: float
    median: float
    most: float
    slowest: int
    """The rank that took the most."""


def over_ranks(ranks: Sequence[Mapping[str, float]]) -> dict[str, Stage]:
    """Each stage, from the seconds that every rank has measured.

    >>> over_ranks([{"write": 2.0}, {"write": 5.0}, {"write": 3.0}])["write"]
    Stage(least=2.0, median=3.0, most=5.0, slowest=1)
    """
    from statistics import median  # Not at the top: who reads manifests need not wait for it.

    stages = {}
    for name in dict.fromkeys(name for seconds in ranks for name in seconds):
        spent = [round(seconds.get(name, 0.0), DIGITS) for seconds in ranks]
        most = max(spent)
        stages[name] = Stage(min(spent), round(median(spent), DIGITS), most, spent.index(most))
    return stages


def encode(stages: Mapping[str, Stage]) -> dict[str, dict[str, float]]:
    """As members of JSON."""
    return {name: asdict(stage) for name, stage in stages.items()}


def decode(stored: Any) -> dict[str, Stage]:
    """What `encode` made, as a stranger's file has it.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, OverflowError: it is something else.
    """
    return {
        name: Stage(
            _seconds(stage["least"]),
            _seconds(stage["median"]),
            _seconds(stage["most"]),
            _rank(stage["slowest"]),
        )
        for name, stage in stored.items()
    }


def _rank(stored: object) -> int:
    if type(stored) is not int or stored < 0:
        raise ValueError("need the number of a rank")
    return stored


def _seconds(stored: object) -> float:
    if not isinstance(stored, int | float) or isinstance(stored, bool):
        raise ValueError(f"need seconds, got a {type(stored).__name__}")
    seconds = float(stored)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"need seconds, got {seconds}")
    return seconds
