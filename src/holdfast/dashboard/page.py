"""The report on a run as one page of HTML, that needs nothing but itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from html import escape
from statistics import median

from holdfast.catalog.listing import CheckpointRow
from holdfast.dashboard.chart import Point, bars, dots, line
from holdfast.dashboard.history import History, slowest
from holdfast.spelling import counted, spelled_age, spelled_bytes, spelled_layout
from holdfast.timing import Times

GENERATOR = '<meta name="generator" content="holdfast report">'
"""Tells a page of ours from any other file."""

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
.state-attempt { color: var(--amber) }
"""


STALL_SAID_S = 0.01
"""A shorter wait is that of a step without a save."""


def page(history: History, now: datetime) -> str:
    """The page."""
    title = escape(history.where)
    return framed(title, body(history, now))


def body(history: History, now: datetime) -> str:
    """What stands on the page, but for the frame around it."""
    return "".join(
        (
            f"<h1>{escape(history.where)}</h1>",
            f"<p>{escape(summary(history))}; looked at {now:%Y-%m-%d %H:%M} UTC</p>",
            f'<div class="cards">{"".join(_cards(history, now))}</div>',
            f'<div class="charts">{"".join(_charts(history))}</div>',
            _table(history, now),
        )
    )


def framed(title: str, body: str, *, script: str = "") -> str:
    """A page around what stands on it, both as HTML. `script` is the place of the one script that
    may run on it; of the page itself nothing is fetched from anywhere, or run."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        policy += "; script-src 'self'; connect-src 'self'"
        script = f'<script src="{script}" defer></script>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"{GENERATOR}"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style>{script}</head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def summary(history: History) -> str:
    """A run's checkpoints in half a sentence."""
    steps = [row for row in history.rows if row.step is not None]
    said = [counted(len(steps), "step")]
    damaged = [row for row in steps if row.state == "damaged"]
    if damaged:
        said.append(f"{len(damaged)} damaged")
    resume = history.resume
    said.append(f"a resume takes step {resume}" if resume is not None else "none to resume from")
    return ", ".join(said)


def _cards(history: History, now: datetime) -> list[str]:
    newest = history.newest
    nbytes = sum(row.nbytes or 0 for row in history.rows)
    cards = [
        ("newest good step", "none" if newest is None else f"{newest.step:,}", _ago(newest, now)),
        ("kept", spelled_bytes(nbytes), counted(len(history.rows), "folder")),
    ]
    reports = history.current
    if reports:
        last = reports[-1]
        cards.append(("step reached", f"{last.step:,}", _since(last.time, now)))
        cards.append(("loss", f"{last.loss:.4g}", f"at step {last.step:,}"))
        speed = median(report.tokens_per_s for report in reports)
        cards.append(("throughput", f"{speed:,.0f}", "tokens/s, median"))
        held_s, share = blocked(history)
        cards.append(("held up by saving", f"{share:.1%}", f"{held_s:,.1f} s of training"))
        saved, gone = len({save.step for r in reports for save in r.saves}), len(history.gone)
        cards.append(("steps saved", f"{saved:,}", f"{gone:,} removed since"))
    if history.loads:
        last_load = history.loads[-1]
        took = f"{counted(len(history.loads), 'time')}, last in {last_load.seconds:.2g} s"
        cards.append(("resumed", f"from {last_load.step:,}", took))
    shown = [_card(*card) for card in cards]
    failed = sum(report.failed_saves for report in history.lived)
    if failed:
        shown.append(_card("saves failed", f"{failed:,}", "the log says why", alarm=True))
    return shown


def _card(name: str, value: str, note: str, *, alarm: bool = False) -> str:
    return (
        f'<div class="card{" alarm" * alarm}"><small>{escape(name)}</small>'
        f"<b>{escape(value)}</b><small>{escape(note)}</small></div>"
    )


def blocked(history: History) -> tuple[float, float]:
    """Seconds that saving has held up training, and their share of the time between reports; where
    a run began anew, the time until then is nobody's."""
    held, spent = 0.0, 0.0
    for before, report in zip(history.reports, history.reports[1:], strict=False):
        if report.step > before.step:
            held += report.save_blocked_s
            spent += max(report.time - before.time, 0.0)
    return held, held / spent if spent else 0.0


def _charts(history: History) -> list[str]:
    current, written = history.current, history.written
    stalls = [
        Point(r.step, r.save_blocked_s, f"step {r.step}: {r.save_blocked_s:.2f} s")
        for r in current
        if r.save_blocked_s > STALL_SAID_S
    ]
    speeds = [
        Point(r.step, r.tokens_per_s, f"step {r.step}: {r.tokens_per_s:,.0f}") for r in current
    ]
    losses = [Point(r.step, r.loss, f"step {r.step}: {r.loss:.4f}") for r in current]
    sizes = [
        Point(row.step or 0, row.nbytes, f"step {row.step}: {spelled_bytes(row.nbytes)}")
        for row in history.rows
        if row.step is not None and row.nbytes
    ]
    ranks = [
        Point(index, nbytes, f"{file}: {spelled_bytes(nbytes)}")
        for index, (file, nbytes) in enumerate(written)
    ]

    def size(value: float) -> str:
        return spelled_bytes(int(value))

    def seconds(value: float) -> str:
        return f"{value:.2g} s"

    charts = (
        ("Steps over time", _legend(history), _course(history)),
        ("Held up by each save", "training waited", bars(stalls, spell=seconds, spell_x=_number)),
        (
            "How long each save took",
            _slow(history),
            bars(_took(history.saves), spell=seconds, spell_x=_number),
        ),
        (
            "How long each resume took",
            "plan, read, apply",
            bars(_took(history.loads), spell=seconds, spell_x=_number),
        ),
        ("Throughput", "tokens/s over all ranks", line(speeds, spell=_short, spell_x=_number)),
        ("Loss", "", line(losses, spell=_short, spell_x=_number)),
        ("Size of each step", "", bars(sizes, spell=size, spell_x=_number)),
        (
            "What each rank wrote",
            "files of the newest good step",
            bars(ranks, spell=size, spell_x=lambda index: written[int(index)][0]),
        ),
    )
    return [
        f'<section class="card"><h2>{name}</h2>{chart}<p>{note}</p></section>'
        for name, note, chart in charts
        if chart
    ]


def _took(operations: Sequence[Times]) -> list[Point]:
    """Until each save was durable, or each load done, with its stages."""
    found = []
    for times in operations:
        stages = (
            f"{name} {stage.most:.2f} s (rank {stage.slowest})"
            for name, stage in times.stages.items()
        )
        found.append(Point(times.step, times.seconds, f"step {times.step}: {', '.join(stages)}"))
    return found


def _slow(history: History) -> str:
    """Which rank the others waited for, mostly."""
    saves = history.saves
    ranks = Counter(map(slowest, saves)).most_common(1)
    if not ranks:
        return ""
    ((rank, times),) = ranks
    return f"until it was durable; rank {rank} was the slowest in {times} of {len(saves)}"


DOTS = {
    "good": "to resume from",
    "model": "the model alone",
    "damaged": "damaged",
    "gone": "saved, and removed since",
}
"""What a checkpoint's dot says, by its style."""


def _legend(history: History) -> str:
    drawn = {_style(row) for row in history.rows if row.step is not None}
    drawn |= {"gone"} if history.gone else set()
    return "".join(
        f'<span class="legend"><svg viewBox="0 0 12 12"><circle class="{style}" cx="6" cy="6" '
        f'r="4.5"/></svg>{said}</span>'
        for style, said in DOTS.items()
        if style in drawn
    )


def _course(history: History) -> str:
    """Steps over time, with the checkpoints as dots."""
    # A step whose index cannot be read was committed when it was reached, more or less.
    reached = {report.step: report.time for report in history.current}
    saves = [
        (row, committed(row) or reached.get(row.step))
        for row in history.rows
        if row.step is not None
    ]
    times = [report.time for report in history.reports]
    begun = min([*times, *(at for _, at in saves if at is not None)], default=0.0)
    behind = [
        Point(report.time - begun, report.step, f"step {report.step}")
        for report in sorted(history.reports, key=lambda report: report.time)
    ]
    points = [Point(at - begun, step, f"step {step}: removed", "gone") for step, at in history.gone]
    points += [
        Point(at - begun, row.step or 0, f"step {row.step}: {row.kind or row.state}", _style(row))
        for row, at in saves
        if at is not None
    ]
    return dots(points, behind=behind, spell=_short, spell_x=spelled_age)


def _table(history: History, now: datetime) -> str:
    head = ("step", "state", "kind", "size", "age", "layout", "note")
    rows = []
    for row in reversed(history.rows):
        notes = [row.problem or "", "pinned" * row.pinned]
        if row.step is not None and row.step == history.resume:
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
        styles = ["", f"state-{row.state}", "", "", "", "", "note"]
        rows.append(
            "".join(
                f'<td class="{style}">{escape(cell)}</td>'
                for style, cell in zip(styles, cells, strict=True)
            )
        )
    header = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<section class="card scroll"><h2>Checkpoints</h2>'
        f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def _style(row: CheckpointRow) -> str:
    return "damaged" if row.state == "damaged" else {"full": "good"}.get(row.kind or "", "model")


def committed(row: CheckpointRow) -> float | None:
    """When a step was committed, in seconds since 1970."""
    try:
        then = datetime.fromisoformat(row.created or "")
    except ValueError:
        return None
    return then.timestamp() if then.tzinfo is not None else None


def _ago(row: CheckpointRow | None, now: datetime) -> str:
    seconds = None if row is None else committed(row)
    return "" if seconds is None else _since(seconds, now)


def _since(seconds: float, now: datetime) -> str:
    return f"{spelled_age(now.timestamp() - seconds)} ago"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _short(value: float) -> str:
    """A number in few characters.

    >>> _short(1234567.0), _short(950.0)
    ('1.23M', '950')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (unit != "k" and abs(value) >= size):
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"
