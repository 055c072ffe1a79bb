"""Make the page about a run, as one self-contained HTML document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from html import escape
from statistics import median

from holdfast.catalog.listing import CheckpointRow, used_bytes
from holdfast.dashboard.chart import Point, bars, dots, line
from holdfast.dashboard.history import History, MetricsRow, blocked, commit_time, slowest
from holdfast.spelling import counted, spelled_age, spelled_bytes, spelled_layout
from holdfast.timing import Times

GENERATOR = '<meta name="generator" content="holdfast report">'
"""Tag in every page. `holdfast report` replaces only files that contain it."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5d6773;
  --rule: #e2e6eb; --blue: #2563c9; --green: #177a45; --red: #c02b2b; --amber: #a86400 }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2026; --ink: #e6e9ed;
  --soft: #9aa4b0; --rule: #2d333b; --blue: #6ea3f7; --green: #4cc38a; --red: #f27c7c;
  --amber: #e0a43c } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 70rem; margin: auto; padding: 1.25rem }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 0 0 .5rem }
p { margin: .25rem 0; color: var(--soft); font-size: .9rem }
.cards, .charts { display: grid; gap: .75rem; margin: .75rem 0 }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)) }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
  padding: .9rem; min-width: 0 }
.card b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums }
.card small { color: var(--soft) }
svg { width: 100%; height: auto; display: block }
.grid { stroke: var(--rule) }
.tick { fill: var(--soft); font-size: 12px }
.line { fill: none; stroke: var(--blue); stroke-width: 2; stroke-linejoin: round }
.quiet { stroke: var(--soft); stroke-width: 1 }
.bar, circle.model { fill: var(--blue) }
.bar.damaged, circle.damaged { fill: var(--red) }
circle { stroke: var(--card) }
circle.good { fill: var(--green) }
circle.gone { fill: var(--card); stroke: var(--soft) }
circle.touch { fill: transparent; stroke: none }
circle.touch:hover { fill: var(--blue) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-top: 1px solid var(--rule);
  white-space: nowrap }
thead th { border: 0; color: var(--soft); font-weight: 500 }
.legend { display: inline-flex; align-items: center; gap: .3rem; margin-right: .8rem }
.legend svg { width: .8rem }
.alarm { border-color: var(--red); color: var(--red) }
a { color: var(--blue) }
.lost h1::after { content: " (the server does not answer)"; color: var(--red) }
td.note { white-space: normal; min-width: 14rem }
.state-good { color: var(--green) }
.state-damaged { color: var(--red); font-weight: 600 }
.state-attempt, .state-local, .state-unreadable { color: var(--amber) }
"""

STALL_MIN_S = 0.01
"""Shortest wait for a save that the page shows. At steps without a save, training waits less."""


def page(history: History, now: datetime) -> str:
    """Return the whole page about a run, as HTML."""
    return framed(escape(history.where), body(history, now))


def body(history: History, now: datetime) -> str:
    """Return the content of the page about a run as HTML, without the frame around it."""
    return (
        f"<h1>{escape(history.where)}</h1>"
        f"<p>{escape(summary(history))}; as of {now:%Y-%m-%d %H:%M} UTC</p>"
        f'<div class="cards">{"".join(_cards(history, now))}</div>'
        f'<div class="charts">{"".join(_charts(history))}</div>' + _table(history, now)
    )


def framed(title: str, body: str, *, script: str = "", style: str = "") -> str:
    """Return a page with this title and body, both given as HTML.

    `script`: URL of the only script that the browser may load for the page. `style`: CSS of this
    page, in addition to `STYLE`.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        policy += "; script-src 'self'; connect-src 'self'"
        script = f'<script src="{script}" defer></script>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"{GENERATOR}"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{style}</style>{script}</head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def summary(history: History) -> str:
    """Return how many checkpoints a run has, and which step a resume would load, as text."""
    checkpoints = [row for row in history.rows if row.step is not None]
    words = [counted(len(checkpoints), "checkpoint")]
    for state in ("damaged", "unreadable"):
        if count := sum(row.state == state for row in checkpoints):
            words.append(f"{count} {state}")
    resume = history.resume
    words.append(f"a resume takes step {resume}" if resume is not None else "none to resume from")
    return ", ".join(words)


def _cards(history: History, now: datetime) -> list[str]:
    newest = history.newest
    nbytes = used_bytes(history.rows)
    cards = [
        ("newest good step", "none" if newest is None else f"{newest.step:,}", _ago(newest, now)),
        ("on disk", spelled_bytes(nbytes), counted(len(history.rows), "folder")),
    ]
    records = history.current
    if records:
        last = records[-1]
        cards.append(("step reached", f"{last.step:,}", _since(last.time, now)))
        cards.append(("loss", f"{last.loss:.4g}", f"at step {last.step:,}"))
        speed = median(record.tokens_per_s for record in records)
        cards.append(("throughput", f"{speed:,.0f}", "tokens/s, median"))
        blocked_s, share = blocked(history)
        cards.append(("blocked by saves", f"{share:.1%}", f"{blocked_s:,.1f} s of training"))
        num_saved = len({save.step for record in records for save in record.saves})
        cards.append(("steps saved", f"{num_saved:,}", f"{len(history.gone):,} removed since"))
    if history.loads:
        last_load = history.loads[-1]
        took = f"{counted(len(history.loads), 'time')}, last in {last_load.seconds:.2g} s"
        cards.append(("resumed", f"from {last_load.step:,}", took))
    shown = [_card(*card) for card in cards]
    num_failed = sum(record.failed_saves for record in history.distinct)
    if num_failed:
        shown.append(_card("saves failed", f"{num_failed:,}", "the log says why", alarm=True))
    return shown


def _card(name: str, value: str, note: str, *, alarm: bool = False) -> str:
    return (
        f'<div class="card{" alarm" * alarm}"><small>{escape(name)}</small>'
        f"<b>{escape(value)}</b><small>{escape(note)}</small></div>"
    )


def _charts(history: History) -> list[str]:
    current, written = history.current, history.written
    stalled = [record for record in current if record.save_blocked_s > STALL_MIN_S]
    stalls = _points(stalled, "save_blocked_s", ".2f", " s")
    speeds = _points(current, "tokens_per_s", ",.0f")
    losses = _points(current, "loss", ".4f")
    sizes = [
        Point(row.step or 0, row.nbytes, f"step {row.step}: {spelled_bytes(row.nbytes)}")
        for row in history.rows
        if row.step is not None and row.nbytes
    ]
    files = [
        Point(index, nbytes, f"{file}: {spelled_bytes(nbytes)}")
        for index, (file, nbytes) in enumerate(written)
    ]

    def seconds(value: float) -> str:
        return f"{value:.2g} s"

    saves = bars(_durations(history.saves), spell=seconds)
    loads = bars(_durations(history.loads), spell=seconds)
    shares = bars(files, spell=spelled_bytes, spell_x=lambda index: written[int(index)][0])
    charts = (
        ("Steps over time", _legend(history), _steps_over_time(history)),
        ("Blocked by each save", "training waited", bars(stalls, spell=seconds)),
        ("Duration of each save", _note_on_slowest(history), saves),
        ("Duration of each resume", "plan, read, apply", loads),
        ("Throughput", "tokens/s over all ranks", line(speeds, spell=short)),
        ("Loss", "", line(losses, spell=short)),
        ("Size of each checkpoint", "", bars(sizes, spell=spelled_bytes)),
        ("Bytes written by each rank", "files of the newest good checkpoint", shares),
    )
    return [
        f'<section class="card"><h2>{name}</h2>{chart}<p>{note}</p></section>'
        for name, note, chart in charts
        if chart
    ]


def _points(rows: Sequence[MetricsRow], name: str, form: str, unit: str = "") -> list[Point]:
    """Return a point for the field `name` of each row. `form`: format of the value in a tooltip."""
    values = [(row.step, getattr(row, name)) for row in rows]
    return [Point(step, value, f"step {step}: {value:{form}}{unit}") for step, value in values]


def _durations(operations: Sequence[Times]) -> list[Point]:
    """Return a point for the duration of each save or load, with its stages in the tooltip."""
    points = []
    for times in operations:
        stages = [f"{n} {s.most:.2f} s (rank {s.slowest})" for n, s in times.stages.items()]
        points.append(Point(times.step, times.seconds, f"step {times.step}: {', '.join(stages)}"))
    return points


def _note_on_slowest(history: History) -> str:
    """Return a note on the rank that was most often the slowest; empty without saves."""
    saves = history.saves
    ranks = Counter(map(slowest, saves)).most_common(1)
    if not ranks:
        return ""
    ((rank, times),) = ranks
    return f"until it was durable; rank {rank} was the slowest in {times} of {len(saves)}"


DOTS = {
    "good": "to resume from",
    "model": "model only",
    "damaged": "damaged",
    "gone": "saved, and removed since",
}
"""Text of the legend for each kind of dot, by CSS class."""


def _legend(history: History) -> str:
    drawn = {_style(row) for row in history.rows if row.step is not None}
    drawn |= {"gone"} if history.gone else set()
    return "".join(
        f'<span class="legend"><svg viewBox="0 0 12 12"><circle class="{style}" cx="6" cy="6" '
        f'r="4.5"/></svg>{text}</span>'
        for style, text in DOTS.items()
        if style in drawn
    )


def _steps_over_time(history: History) -> str:
    """Draw the steps of a run over time, with its checkpoints as dots."""
    # If the index of a checkpoint cannot be read, use the time at which the run reported its step.
    reported = {record.step: record.time for record in history.current}
    committed = [
        (row, time)
        for row in history.rows
        if row.step is not None and (time := commit_time(row) or reported.get(row.step))
    ]
    times = [*(row.time for row in history.reports), *(time for _, time in committed)]
    start = min(times, default=0.0)
    behind = [
        Point(record.time - start, record.step, f"step {record.step}")
        for record in sorted(history.reports, key=lambda record: record.time)
    ]
    points = [
        Point(time - start, step, f"step {step}: removed", "gone") for step, time in history.gone
    ]
    points += [
        Point(time - start, row.step or 0, f"step {row.step}: {row.kind or row.state}", _style(row))
        for row, time in committed
    ]
    return dots(points, behind=behind, spell=short, spell_x=spelled_age)


def _table(history: History, now: datetime) -> str:
    head = ("step", "state", "kind", "size", "age", "layout", "note")
    rows, resume = [], history.resume
    for row in reversed(history.rows):
        notes = [row.problem or "", "pinned" * row.pinned]
        if row.step is not None and row.step == resume:
            notes.append("a resume takes this one")
        cells = (
            row.name if row.step is None else f"{row.step:,}",
            row.state,
            row.kind or "",
            "" if row.nbytes is None else spelled_bytes(row.nbytes),
            _ago(row, now),
            spelled_layout(row.layout),
            "; ".join(filter(None, notes)),
        )
        styles = {"state": f"state-{row.state}", "note": "note"}
        named = zip(head, cells, strict=True)
        drawn = (f'<td class="{styles.get(name, "")}">{escape(cell)}</td>' for name, cell in named)
        rows.append(f"<tr>{''.join(drawn)}</tr>")
    header, body = "".join(f"<th>{name}</th>" for name in head), "".join(rows)
    return (
        '<section class="card scroll"><h2>Checkpoints</h2>'
        f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def _style(row: CheckpointRow) -> str:
    return "damaged" if row.state == "damaged" else {"full": "good"}.get(row.kind or "", "model")


def _ago(row: CheckpointRow | None, now: datetime) -> str:
    time = None if row is None else commit_time(row)
    return "" if time is None else _since(time, now)


def _since(time: float, now: datetime) -> str:
    return f"{spelled_age(now.timestamp() - time)} ago"


def short(value: float) -> str:
    """Format a number in few characters.

    >>> short(1234567.0), short(950.0)
    ('1.23M', '950')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (unit != "k" and abs(value) >= size):
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"
