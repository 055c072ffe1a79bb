"""What a benchmark found, kept as a file: tables, plots and the summary are made of these."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.meter import Figure, machine

DATA = "data"


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark: figures of each system, round by round."""

    name: str
    title: str
    method: str
    """A sentence or two: what was done, how often, and what each figure is."""

    figures: Mapping[str, Sequence[Figure]]
    facts: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the state: `nbytes`, ..."""

    machine: str = field(default_factory=machine)

    def median(self, system: str, column: str) -> float:
        """Of one system's figures in a column."""
        return statistics.median(figure[column] for figure in self.figures[system])

    def best(self, systems: Sequence[str], column: str) -> str:
        """The system among those that are there with the least."""
        there = [system for system in systems if system in self.figures]
        return min(there, key=lambda system: self.median(system, column))

    def ratios(self, system: str, other: str, column: str = "seconds") -> list[float]:
        """Of their figures, round by round."""
        pairs = zip(self.figures[system], self.figures[other], strict=True)
        return [one[column] / two[column] for one, two in pairs]

    def most(self, system: str, column: str) -> float:
        """The greatest of its figures."""
        return max(figure[column] for figure in self.figures[system])


def store(section: Section, folder: Path, *, add: bool) -> None:
    """Keep what was found; `add` puts it beside the rounds of the same benchmark that are there."""
    path = folder / DATA / f"{section.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = asdict(section)
    if add and path.exists():
        there = json.loads(path.read_text())
        assert (there["machine"], there["facts"]) == (section.machine, dict(section.facts)), path
        kept["figures"] = {n: [*there["figures"][n], *f] for n, f in section.figures.items()}
    path.write_text(json.dumps(kept, indent=1) + "\n")


def stored(folder: Path) -> dict[str, Section]:
    """All that was kept, by name."""
    found: dict[str, Section] = {}
    for path in sorted((folder / DATA).glob("*.json")):
        read: Any = json.loads(path.read_text())
        found[path.stem] = Section(**read)
    return found
