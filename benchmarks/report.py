"""Page of results, made from the stored figures: summary, tables and plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.plots import Bar, bar_chart
from benchmarks.results import Section, load_sections
from benchmarks.targets import TARGETS, verdict

HEADS = {
    "seconds": "seconds",
    "cpu_s": "CPU, s",
    "extra_mib": "extra memory, MiB",
    "read_mb": "read, MB",
    "needed_mb": "needed, MB",
    "lost_s": "lost per save, s",
    "blocked_s": "blocked, s",
    "durable_s": "durable after, s",
    "slowed_pct": "steps slowed, %",
    "step_s": "plain step, s",
}
PLOTTED = {"small": ("cpu_s",), "overlap": ("lost_s", "durable_s"), "listing": ()}
"""Columns to plot by section, where they are not `seconds`."""

OUTCOMES = {True: "met", False: "**missed**", None: "-"}
"""Cell of a table of targets, by whether the target was met; None: not measured."""

WITHOUT_BYTES = ("listing",)
"""Sections whose work does not grow with the bytes of the state."""

ORDER = (
    "saving",
    "loading",
    "cold",
    "small",
    "overlap",
    "sharded_saving",
    "sharded_loading",
    "sharded_cold",
    "resharding",
    "listing",
)
HEAD = """# Results

Run `python -m benchmarks.run` to measure all figures on this page and to write it again. With
`--quick` it measures a small state in a short time. Compare figures only within one table: they
depend on the machine and its load.

* **Rounds.** In each round all systems run one after the other, in changing order. A first round is
  not counted.
* **Figures** are medians of the rounds. Ratios are medians of the rounds' ratios, with minimum and
  maximum.
* **Saves** are synced.
* **`raw`** is the limit of the machine: as many bytes, written with O_DIRECT and synced, or read
  from Holdfast's files into the same memory. It writes one buffer of 32 MiB again and again, which
  stays in the CPU cache; **`raw, from memory`** writes the state itself. Before the rounds, the
  fastest of 1, 2 and 4 threads and of windows of 1, 8 and 32 MiB is chosen. Tables that do not name
  it are of two threads and 8 MiB.
* **CPU, s per GB** is per GB of the state, or of the part that a rank needs.
* **Method.** The module of each part in `benchmarks/` describes its method.

[Conversions](convert.md), [planning of saves](planning.md), [planning of
loads](planning_loads.md), [thousands of checkpoints](many_checkpoints.md), [object
stores](objects.md) and [restarts](restarts.md) have pages of their own.
"""


def write_report(folder: Path) -> None:
    """Write the page and its plots to the folder of the stored figures."""
    stored = load_sections(folder)
    sections = {name: stored[name] for name in ORDER if name in stored}
    lines = [HEAD, *_machines(list(sections.values())), "", *_summary(sections)]
    for section in sections.values():
        lines += ["", f"## {section.title}", "", f"{section.method} {_rounds(section)}", ""]
        lines += table(section)
        for column in PLOTTED.get(section.name, ("seconds",)):
            plot = folder / f"{section.name}-{column}.svg"
            title = f"{section.title}: {HEADS[column]}"
            plot.write_text(bar_chart(title, list(_bars(section, column))))
            lines += ["", f"![{title}]({plot.name})"]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _machines(sections: Sequence[Section]) -> list[str]:
    return [f"Machine: {machine}." for machine in dict.fromkeys(s.machine for s in sections)]


def _rounds(section: Section) -> str:
    return f"Rounds: {len(next(iter(section.figures.values())))}."


def _summary(sections: dict[str, Section]) -> list[str]:
    lines = ["| figure | target | measured | result |", "|---|---|---|---|"]
    for target in TARGETS:
        result = verdict(target, sections)
        outcome = OUTCOMES[result.met]
        lines.append(f"| {target.figure} | {target.target} | {result.measured} | {outcome} |")
    return lines


def table(section: Section, compared: Sequence[str] = ("raw", "holdfast")) -> list[str]:
    """Lines of a table of all systems, with ratios to those of `compared` that were measured."""
    figures = [figure for rounds in section.figures.values() for figure in rounds]
    # Columns without a value in any round are left out: saves read nothing.
    least = {"read_mb": 1.0}
    columns = [
        column
        for column in HEADS
        if max(figure.get(column, 0.0) for figure in figures) >= least.get(column, 1e-3)
    ]
    per_gb = "cpu_s" in columns and section.name not in WITHOUT_BYTES
    compared = [name for name in compared if name in section.figures]
    head = [
        "system",
        *(HEADS[column] for column in columns),
        *(["CPU, s per GB"] if per_gb else []),
        *(f"times {name}" for name in compared),
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in section.figures:
        cells = [_format(section.median(name, column)) for column in columns]
        if per_gb:
            nbytes = section.figures[name][0].get("needed_mb", section.facts["nbytes"] / 1e6) * 1e6
            cells.append(_format(section.median(name, "cpu_s") / nbytes * 1e9))
        for other in compared:
            cells.append(f"{statistics.median(section.ratios(name, other)):.2f}")
        lines.append(f"| {' | '.join((name, *cells))} |")
    return lines


def _format(value: float) -> str:
    """Format with about three significant digits.

    >>> _format(0.01234), _format(1.5), _format(2312.7)
    ('0.012', '1.50', '2,313')
    """
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _bars(section: Section, column: str) -> Iterator[Bar]:
    for name, figures in section.figures.items():
        values = [figure[column] for figure in figures]
        yield Bar(name, statistics.median(values), min(values), max(values))
