"""Make the page about all runs: a table with a row per run, the worst first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.resources import files
from itertools import takewhile

from holdfast.catalog.paths import full_path
from holdfast.dashboard.condition import STATES, Condition, Limits, State, condition_of
from holdfast.dashboard.figures import NO_FIGURES, Figures, curve
from holdfast.dashboard.watch import WatchedFolder
from holdfast.spelling import counted, spelled_age, spelled_bytes

STYLE = files(__package__).joinpath("runs.css").read_text("utf-8")
"""CSS of the table, in addition to the CSS of every page."""

CURVE_POINTS_MAX = 60
CURVE_WIDTH, CURVE_HEIGHT, CURVE_MARGIN = 120, 26, 3

COLUMNS = {
    "state": "State",
    "run": "Run",
    "step": "Newest good step",
    "age": "Age",
    "loss": "Last loss",
    "rate": "Save rate",
    "blocked": "Blocked by saves",
    "size": "On disk",
    "note": "Note",
}
"""Heading of each column, by its name."""

UNSORTED = ("note",)
"""Columns by which the table cannot be sorted."""

DESCENDING = ("step", "age", "rate", "blocked", "size")
"""Columns that the first click sorts with the largest value first."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table."""

    text: str
    """Main line, as HTML."""

    small: str = ""
    """Second line, as HTML."""

    key: float | str | None = None
    """Value to sort by; None sorts last."""


@dataclass(frozen=True, slots=True)
class Row:
    """Row of the table: one run."""

    name: str
    state: State
    has_alarm: bool
    html: str


def runs_page(
    runs: Mapping[int, WatchedFolder],
    now: datetime,
    limits: Limits,
    *,
    incomplete: Sequence[str] = (),
) -> tuple[str, str]:
    """Return the title of the page about all runs as text, and its content as HTML.

    `incomplete`: given folders that were searched only in part.
    """
    names = short_names([run.folder for run in runs.values()])
    drawn = [_row(number, run, names[run.folder], now, limits) for number, run in runs.items()]
    rows = sorted(drawn, key=lambda row: (STATES.index(row.state), not row.has_alarm, row.name))
    counts = Counter(row.state for row in rows)
    title = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    chips = "".join(
        f'<span class="count {_css(state)}"><b>{counts[state]}</b> {state}</span>'
        for state in STATES
        if counts[state]
    )
    hints = "".join(
        f'<p class="limit">Only a part of {escape(folder)} was searched for runs: it is too '
        "large.</p>"
        for folder in incomplete
    )
    hints += "" if rows else "<p>No runs yet.</p>"
    content = (
        f'<header><h1>{counted(len(runs), "run")}</h1><div id="counts">{chips}</div>'
        f'<p id="time">as of {now:%Y-%m-%d %H:%M} UTC</p></header><div id="hints">{hints}</div>'
        f'<table class="runs"><thead><tr>{_head()}</tr></thead>'
        f"<tbody>{''.join(row.html for row in rows)}</tbody></table>"
    )
    return f"{title or 'no runs'} - Holdfast", content


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """Return a short name for each folder.

    The name lacks the first components of the path that all folders have in common. It also lacks
    a last component `checkpoint`, if all names are still different without it.

    >>> short_names(["runs/a/checkpoint", "runs/b/checkpoint"])
    {'runs/a/checkpoint': 'a', 'runs/b/checkpoint': 'b'}
    >>> short_names(["outputs/checkpoint"])
    {'outputs/checkpoint': 'outputs'}
    >>> short_names(["s3://bucket/runs/a", "s3://bucket/runs/b"])
    {'s3://bucket/runs/a': 'a', 's3://bucket/runs/b': 'b'}
    """
    full = {folder: full_path(folder) for folder in folders}
    shortest = {folder: path.removesuffix("/checkpoint") for folder, path in full.items()}
    paths = full if len(set(shortest.values())) < len(set(full.values())) else shortest
    parts = {folder: path.split("/") for folder, path in paths.items()}
    levels = zip(*[names[:-1] for names in parts.values()], strict=False)
    num_common = sum(1 for _ in takewhile(lambda names: len({*names}) == 1, levels))
    return {folder: "/".join(names[num_common:]) for folder, names in parts.items()}


def _head() -> str:
    cells = []
    for name, heading in COLUMNS.items():
        if name in UNSORTED:
            cells.append(f'<th class="{name}">{heading}</th>')
        else:
            first = "descending" if name in DESCENDING else "ascending"
            button = f'<button type="button" data-first="{first}">{heading}</button>'
            cells.append(f'<th class="{name}" data-column="{name}" aria-sort="none">{button}</th>')
    return "".join(cells)


def _row(number: int, run: WatchedFolder, name: str, now: datetime, limits: Limits) -> Row:
    figures = run.latest.figures
    try:
        condition = condition_of(run, now, limits)
        html = _drawn(number, run.folder, name, figures, condition)
    except Exception as error:  # noqa: BLE001 - an error of one run must not hide the others
        note = f"{type(error).__name__}: {error}"
        condition = Condition("unreadable", None, None, (note,))
        html = _drawn(number, run.folder, name, NO_FIGURES, condition)
    return Row(name, condition.state, bool(condition.alarms), html)


def _drawn(number: int, folder: str, name: str, figures: Figures, condition: Condition) -> str:
    state = condition.state
    alarms, notes = "; ".join(condition.alarms), "; ".join(condition.notes)
    shown = [f'<b class="alarm">{escape(alarms)}</b>' if alarms else "", escape(notes)]
    note = f'<span title="{escape("; ".join((*condition.alarms, notes)))}">'
    cells = {
        "state": Cell(f'<span class="chip">{state}</span>', key=STATES.index(state)),
        "run": Cell(
            f'<a href="/runs/{number}">{escape(name)}</a>', escape(folder), key=name.lower()
        ),
        "step": _step(figures),
        "age": _age(figures, condition),
        "loss": _loss(figures),
        "rate": _rate(figures),
        "blocked": _blocked(figures),
        "size": _size(figures),
        "note": Cell(f"{note}{'; '.join(filter(None, shown))}</span>"),
    }
    drawn = "".join(_cell(column, cell) for column, cell in cells.items())
    return f'<tr id="run-{number}" class="{_css(state)}">{drawn}</tr>'


def _cell(column: str, cell: Cell) -> str:
    key = "" if cell.key is None else f' data-key="{escape(str(cell.key))}"'
    small = f"<small>{cell.small}</small>" if cell.small else ""
    empty = "" if cell.text else " empty"
    label = escape(COLUMNS[column])
    return f'<td class="{column}{empty}" data-label="{label}"{key}>{cell.text}{small}</td>'


def _css(state: str) -> str:
    return f"is-{state.replace(' ', '-')}"


def _step(figures: Figures) -> Cell:
    step = None if figures.newest is None else figures.newest.step
    more = [f"reached {figures.last.step:,}"] if figures.last is not None else []
    if figures.tier is not None and figures.tier.step is not None:
        behind = f", copy {figures.behind:,} behind" if figures.behind else ""
        more.append(f"local {figures.tier.step:,}{behind}")
    return Cell("none" if step is None else f"{step:,}", "<br>".join(more), key=step)


def _age(figures: Figures, condition: Condition) -> Cell:
    age_s, stale_s, interval_s = condition.age_s, condition.stale_s, figures.interval_s
    if age_s is None or figures.saved_at is None:
        return Cell("")
    meter = ""
    if stale_s is not None and condition.state != "finished":
        share = min(age_s / stale_s, 1.0)
        mark = (
            "" if interval_s is None else f'<i style="left:{min(interval_s / stale_s, 1):.1%}"></i>'
        )
        meter = f'<span class="meter"><b style="width:{share:.0%}"></b>{mark}</span>'
    every = "" if interval_s is None else f"<small>every {spelled_age(interval_s)}</small>"
    text = f'<span class="times">{spelled_age(age_s)}{every}</span>{meter}'
    # Sort by the time of the commit, not by the age, which would change the row at every request.
    return Cell(text, key=-figures.saved_at)


def _loss(figures: Figures) -> Cell:
    if not figures.losses:
        return Cell("")
    loss = figures.losses[-1][1]
    style = "" if math.isfinite(loss) else ' class="alarm"'
    text = f"<span{style}>{loss:#.4g}</span>{sparkline(figures.losses)}"
    return Cell(text, key=loss if math.isfinite(loss) else None)


def sparkline(losses: Sequence[tuple[int, float]]) -> str:
    """Draw the latest losses as a small curve; empty for fewer than two losses."""
    values = curve(losses, CURVE_POINTS_MAX)
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    extent = (high - low) or 1.0
    across = (CURVE_WIDTH - 2 * CURVE_MARGIN) / (len(values) - 1)
    down = CURVE_HEIGHT - 2 * CURVE_MARGIN
    points = [
        (CURVE_MARGIN + index * across, CURVE_MARGIN + (high - value) / extent * down)
        for index, value in enumerate(values)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    area = f"{CURVE_MARGIN},{CURVE_HEIGHT} {path} {points[-1][0]:.1f},{CURVE_HEIGHT}"
    title = f"steps {losses[0][0]:,} to {losses[-1][0]:,}: {low:.4g} to {high:.4g}"
    return (
        f'<svg class="curve" viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" role="img">'
        f'<title>{title}</title><polygon points="{area}"/><polyline points="{path}"/>'
        f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2.5"/></svg>'
    )


def _rate(figures: Figures) -> Cell:
    if figures.save_rate is None or figures.save_bytes is None:
        return Cell("")
    each = f"{spelled_bytes(figures.save_bytes)} each"
    return Cell(f"{spelled_bytes(figures.save_rate)}/s", each, key=figures.save_rate)


def _blocked(figures: Figures) -> Cell:
    if figures.blocked_share is None:
        return Cell("")
    share = figures.blocked_share
    digits = 2 if 0 < share < 0.01 else 1
    return Cell(f"{share:.{digits}%}", spelled_age(figures.totals.blocked_s), key=share)


def _size(figures: Figures) -> Cell:
    num = figures.num_good + len(figures.damaged) + len(figures.unreadable)
    if not num:
        return Cell("")
    return Cell(spelled_bytes(figures.nbytes), counted(num, "checkpoint"), key=figures.nbytes)
