"""Facts about a run, such as its newest checkpoint, for the table of runs and for Prometheus.

They do not depend on the current time. They are computed once after each change of the run, so
that no request has to process the whole history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from holdfast.catalog.listing import CheckpointRow, used_bytes
from holdfast.catalog.tier import TierView
from holdfast.dashboard.history import History, MetricsRow, blocked, commit_time

SAVES = 10
"""Number of latest saves from which the median interval and rate are computed."""

LOSSES = 400
"""Maximum number of latest losses in `Figures.losses`."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all starts and resumes of a run."""

    num_saves: int = 0
    """Number of saves that became durable."""

    saved_bytes: int = 0
    save_s: float = 0.0
    """Seconds that saves took, each from its plan until it was durable."""

    stage_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the slowest rank of each save spent in each stage."""

    blocked_s: float = 0.0
    """Seconds that training waited for saves."""

    num_failed: int = 0
    """Number of failed saves."""

    num_loads: int = 0
    """Number of resumes."""

    load_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Facts about a run that one read of its folder has shown."""

    newest: CheckpointRow | None = None
    """Checkpoint that a resume would load."""

    saved_at: float | None = None
    """Unix time at which `newest` was committed; None if unknown."""

    checked_at: float | None = None
    """Unix time of the last resume that loaded `newest` and verified its checksums, if any."""

    interval_s: float | None = None
    """Median of the seconds between two of the latest saves; None before the second save."""

    save_rate: float | None = None
    """Median rate of the latest saves, in bytes per second."""

    save_bytes: int | None = None
    """Bytes that the latest save has written."""

    num_good: int = 0
    damaged: Sequence[CheckpointRow] = ()
    unreadable: Sequence[CheckpointRow] = ()
    num_unfinished: int = 0
    """Number of folders of unfinished saves and deletions."""

    written_at: float | None = None
    """Unix time of the last change in an unfinished save; None without such a save."""

    nbytes: int = 0
    """Size of all checkpoints together, in bytes."""

    is_finished: bool = False
    """Whether the run has ended as planned: its newest checkpoint holds the model alone, or
    transformers' Trainer has reached its last step."""

    last: MetricsRow | None = None
    """Last line of `metrics.jsonl`; None without metrics."""

    losses: Sequence[tuple[int, float]] = ()
    """Step and loss of the latest steps, sorted by step."""

    blocked_share: float | None = None
    """Share of the running time that training waited for saves; None without metrics."""

    totals: Totals = Totals()

    tier: TierView | None = None
    """Fast tier of the run, as far as this machine sees it; None if the run has no fast tier."""

    behind: int | None = None
    """Number of steps by which the folder of the run is behind the fast tier; None if this machine
    sees no step in the fast tier."""


NO_FIGURES = Figures()
"""The `Figures` of a run about which nothing is known."""


def figures_of(history: History) -> Figures:
    """Compute the numbers that the dashboard shows for a run, such as its newest step and save
    rate."""
    rows, newest, saves = history.rows, history.newest, history.saves
    timed = [save for save in saves if save.seconds > 0 and save.nbytes][-SAVES:]
    blocked_s, share = blocked(history)
    good = [row for row in rows if row.state == "good"]
    return Figures(
        newest=newest,
        saved_at=None if newest is None else commit_time(newest),
        checked_at=None if newest is None else _checked_at(history, newest.step),
        interval_s=_interval_s(history),
        save_rate=median(save.nbytes / save.seconds for save in timed) if timed else None,
        save_bytes=timed[-1].nbytes if timed else None,
        num_good=len(good),
        damaged=[row for row in rows if row.state == "damaged"],
        unreadable=[row for row in rows if row.state == "unreadable"],
        num_unfinished=sum(row.state == "attempt" for row in rows),
        written_at=history.written_at,
        nbytes=used_bytes(rows),
        is_finished=history.trainer.is_finished or (bool(good) and _is_last(good[-1], history)),
        last=history.reports[-1] if history.reports else None,
        losses=_latest_losses(history),
        blocked_share=share if len(history.reports) > 1 else None,
        totals=_totals(history, blocked_s),
        tier=history.tier,
        behind=_behind(history),
    )


def _behind(history: History) -> int | None:
    if history.tier is None or history.tier.step is None:
        return None
    durable = [row.step for row in history.rows if row.state == "good" and row.step is not None]
    return max(history.tier.step - max(durable, default=0), 0)


def _is_last(row: CheckpointRow, history: History) -> bool:
    """Whether the run has ended with the checkpoint `row`, which then holds the model alone, and
    after which there was no step."""
    if row.kind not in ("model", "hf") or not row.step:
        return False
    return not history.reports or history.reports[-1].step <= row.step


def _interval_s(history: History) -> float | None:
    """Return the median time between the latest saves, even if their checkpoints were deleted."""
    times = {save.step: row.time for row in history.reports for save in row.saves}
    for row in history.rows:
        time = commit_time(row)
        if row.step is not None and time is not None:
            times[row.step] = time
    latest = [times[step] for step in sorted(times)][-SAVES - 1 :]
    # After a run has gone back, a later step may have an earlier save. Skip such negative gaps.
    gaps = [after - before for before, after in pairwise(latest) if after > before]
    return median(gaps) if gaps else None


def _checked_at(history: History, step: int | None) -> float | None:
    times = [row.time for row in history.reports for load in row.loads if load.step == step]
    return max(times, default=None)


def _latest_losses(history: History) -> list[tuple[int, float]]:
    pairs = history.trainer.losses
    if history.reports:
        # Read twice as many rows as are shown: a step that a resume repeated has several rows.
        pairs = [(row.step, row.loss) for row in history.reports[-2 * LOSSES :]]
    latest: list[tuple[int, float]] = []
    for step, loss in reversed(pairs):
        if not latest or step < latest[-1][0]:
            latest.append((step, loss))
    return latest[:LOSSES][::-1]


def _totals(history: History, blocked_s: float) -> Totals:
    records = history.distinct
    saves = [save for record in records for save in record.saves]
    loads = [load for record in records for load in record.loads]
    stage_s = dict.fromkeys((name for save in saves for name in save.stages), 0.0)
    for save in saves:
        for name, stage in save.stages.items():
            stage_s[name] += stage.most
    return Totals(
        num_saves=len(saves),
        saved_bytes=sum(save.nbytes for save in saves),
        save_s=sum(save.seconds for save in saves),
        stage_s=stage_s,
        blocked_s=blocked_s,
        num_failed=sum(record.failed_saves for record in records),
        num_loads=len(loads),
        load_s=sum(load.seconds for load in loads),
    )


def curve(losses: Sequence[tuple[int, float]], num_max: int) -> list[float]:
    """Return at most `num_max` finite losses, each the mean of a group of neighbours."""
    finite = [loss for _, loss in losses if math.isfinite(loss)]
    size = max(math.ceil(len(finite) / num_max), 1)
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [sum(group) / len(group) for group in groups]
