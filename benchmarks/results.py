"""Stored results of the benchmarks, from which tables, plots and the summary are made."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.meter import Figure, machine
from benchmarks.options import BenchmarkOptions, parse_options, silence_warnings

DATA = "data"


@dataclass(frozen=True, slots=True)
class Section:
    """Results of one benchmark."""

    name: str
    title: str
    method: str
    """Method in a sentence or two: work, size of the state, meaning of the columns."""

    figures: Mapping[str, Sequence[Figure]]
    """Measurements of each round, by system."""

    facts: Mapping[str, float] = field(default_factory=dict)
    """Numbers that describe the state, such as `nbytes`."""

    machine: str = field(default_factory=machine)

    def median(self, system: str, column: str) -> float:
        """Return the median over a system's rounds."""
        return statistics.median(figure[column] for figure in self.figures[system])

    def best(self, systems: Sequence[str], column: str) -> str:
        """Return the measured system with the least median."""
        measured = [system for system in systems if system in self.figures]
        return min(measured, key=lambda system: self.median(system, column))

    def ratios(self, system: str, other: str, column: str = "seconds") -> list[float]:
        """Return each round's ratio of two systems."""
        pairs = zip(self.figures[system], self.figures[other], strict=True)
        return [a[column] / b[column] for a, b in pairs]

    def most(self, system: str, column: str) -> float:
        """Return the maximum over a system's rounds."""
        return max(figure[column] for figure in self.figures[system])


def measure_parts(
    description: str | None, parts: Mapping[str, Callable[[BenchmarkOptions, Path], Section]]
) -> None:
    """Measure the parts that the command line names, and store their figures."""
    options = parse_options(description, tuple(parts))
    silence_warnings()
    for part in options.parts:
        with options.temporary_folder() as folder:
            save_section(parts[part](options, folder), options.out, add=options.add)


def save_section(section: Section, folder: Path, *, add: bool) -> None:
    """Store a section; `add` appends its rounds to those stored for the same machine and state."""
    path = folder / DATA / f"{section.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = asdict(section)
    if add and path.exists():
        old = json.loads(path.read_text())
        assert (old["machine"], old["facts"]) == (section.machine, dict(section.facts)), path
        stored["figures"] = {n: [*old["figures"][n], *f] for n, f in section.figures.items()}
    path.write_text(json.dumps(stored, indent=1) + "\n")


def load_sections(folder: Path) -> dict[str, Section]:
    """Load all stored sections, by name."""
    paths = sorted((folder / DATA).glob("*.json"))
    return {path.stem: Section(**json.loads(path.read_text())) for path in paths}
