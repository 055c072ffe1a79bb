"""The page of results, made of what the benchmarks kept: summary, tables and plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.plots import Bar, bars
from benchmarks.results import Section, stored
from benchmarks.targets import ROWS, verdict

HEADS = {
    "seconds": "seconds",
    "cpu_s": "CPU, s",
    "extra_mib": "extra memory, MiB",
    "read_mb": "read, MB",
    "needed_mb": "needed, MB",
    "lost_s": "lost a save, s",
    "blocked_s": "blocked, s",
    "durable_s": "durable after, s",
    "slowed_pct": "steps slowed, %",
    "step_s": "plain step, s",
}
PLOTTED = {"small": ("cpu_s",), "overlap": ("lost_s", "durable_s"), "listing": ()}
ORDER = (
    *("saving", "loading", "cold", "small", "overlap"),
    *("sharded_saving", "sharded_loading", "sharded_cold", "resharding", "listing"),
)
HEAD = """# Results

`python -m benchmarks.run` measures all of this and makes this page; `--quick` is small and short.
Systems take turns within each round, in another order each time, after a round that is not counted;
figures are medians, ratios are medians of the rounds' ratios with the least and the greatest. All
saves are synced. `raw` is the same bytes written with O_DIRECT by two threads and synced, or read
into the same memory. What each part does is said at the top of its module. Between machines, and on
a busy one, figures mean nothing. Also here: [conversions](convert.md), [planning](planning.md).
"""


def write_report(folder: Path) -> None:
    """Write the page and its plots beside the data in a folder."""
    found = stored(folder)
    sections = {name: found[name] for name in ORDER if name in found}
    lines = [HEAD, *_machines(list(sections.values())), "", *_summary(sections)]
    for section in sections.values():
        lines += ["", f"## {section.title}", "", f"{section.method} {_rounds(section)}", ""]
        lines += _table(section)
        for column in PLOTTED.get(section.name, ("seconds",)):
            plot = folder / f"{section.name}-{column}.svg"
            title = f"{section.title}: {HEADS[column]}"
            plot.write_text(bars(title, list(_bars(section, column))))
            lines += ["", f"![{title}]({plot.name})"]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _machines(sections: Sequence[Section]) -> list[str]:
    return [f"Machine: {machine}." for machine in dict.fromkeys(s.machine for s in sections)]


def _rounds(section: Section) -> str:
    return f"Rounds: {len(next(iter(section.figures.values())))}."


def _summary(sections: dict[str, Section]) -> list[str]:
    lines = ["| figure | target | measured | |", "|---|---|---|---|"]
    for row in ROWS:
        found = verdict(row, sections)
        how = {True: "met", False: "**missed**", None: "-"}[found.met]
        lines.append(f"| {row.figure} | {row.target} | {found.said} | {how} |")
    return lines


def _table(section: Section) -> list[str]:
    every = [figure for figures in section.figures.values() for figure in figures]
    # Bytes read are nothing where a system writes, or maps its files.
    columns = [c for c in HEADS if any(c in f for f in every) and max(f[c] for f in every) >= 1e-3]
    if max(figure.get("read_mb", 0.0) for figure in every) < 1:
        columns = [column for column in columns if column != "read_mb"]
    beside = [name for name in ("raw", "holdfast") if name in section.figures]
    head = ["system", *(HEADS[column] for column in columns), *(f"x {name}" for name in beside)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in section.figures:
        cells = [_spelled(section.median(name, column)) for column in columns]
        for other in beside:
            cells.append(f"{statistics.median(section.ratios(name, other)):.2f}")
        lines.append(f"| {' | '.join((name, *cells))} |")
    return lines


def _spelled(value: float) -> str:
    """Three digits that count.

    >>> _spelled(0.01234), _spelled(1.5), _spelled(2312.7)
    ('0.012', '1.50', '2,313')
    """
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _bars(section: Section, column: str) -> Iterator[Bar]:
    for name, figures in section.figures.items():
        values = [figure[column] for figure in figures]
        yield Bar(name, statistics.median(values), min(values), max(values))
