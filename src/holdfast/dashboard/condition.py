"""Determine the current state of a run, for the table of runs and for metrics."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from holdfast.catalog.listing import CheckpointRow
from holdfast.catalog.tier import TierView
from holdfast.dashboard.figures import Figures
from holdfast.dashboard.watch import ReadResult, WatchedFolder
from holdfast.spelling import counted, spelled_age

State = Literal[
    "damaged",
    "gone",
    "unreadable",
    "never saved",
    "stale",
    "saving",
    "good",
    "finished",
]
"""State of a run.

`damaged`: a checkpoint is damaged. `gone`: its checkpoints existed, but do not exist any more.
`unreadable`: its folder or a checkpoint in it cannot be read, or hangs. `never saved`: there is no
checkpoint to resume from. `stale`: the newest good checkpoint is older than the limit. `saving`: a
save is being written. `good`: no other state applies. `finished`: the run has ended as planned.
"""

STATES: tuple[State, ...] = get_args(State)
"""All states, the worst first."""

WRITING_S = 120.0
"""Seconds since its last change for which an unfinished save counts as being written."""

HANG_S = 60.0
"""Seconds without a read after which a folder counts as hanging; more if its reads are rare."""

_FOLDER = re.compile(r"^`[^`]*`( is damaged)?:")
"""Beginning of a message about damage. It only names the checkpoint, which the table shows."""

STALE_MIN_S = 10.0
"""Minimum age of a stale checkpoint, since commit times have a precision of a second."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the age of a run's newest good checkpoint."""

    stale_intervals: float = 3.0
    """Limit for each run, as a number of its own save intervals."""

    max_age_s: float | None = None
    """Additional limit in seconds for every run; None for no such limit."""

    def stale_s(self, figures: Figures) -> float | None:
        """Return the age in seconds above which a checkpoint is stale; None if unknown."""
        limits = [] if self.max_age_s is None else [self.max_age_s]
        if figures.interval_s is not None:
            limits.append(max(self.stale_intervals * figures.interval_s, STALE_MIN_S))
        return min(limits, default=None)


@dataclass(frozen=True, slots=True)
class Condition:
    """Current state of a run, with the reasons."""

    state: State
    age_s: float | None
    """Age in seconds of the newest good checkpoint; None if unknown."""

    stale_s: float | None
    """Age in seconds above which the newest good checkpoint is stale; None if unknown."""

    notes: tuple[str, ...]
    """Reason for the state, then other facts, each as a sentence without a full stop."""

    alarms: tuple[str, ...] = ()
    """Facts that need attention in any state: the loss is not finite, or saves failed."""


def age_s_of(figures: Figures, now: datetime) -> float | None:
    """Return the age in seconds of the checkpoint that a resume would load; None if unknown."""
    return None if figures.saved_at is None else max(now.timestamp() - figures.saved_at, 0.0)


def condition_of(run: WatchedFolder, now: datetime, limits: Limits) -> Condition:
    """Return the current state of a run, with the reasons."""
    latest, time = run.latest, now.timestamp()
    figures = latest.figures
    age_s = age_s_of(figures, now)
    stale_s = limits.stale_s(figures)
    is_writing = figures.written_at is not None and time - figures.written_at < WRITING_S
    state, why = _state(latest, time, age_s=age_s, stale_s=stale_s, is_writing=is_writing)
    notes = [why, *_facts(figures, time, state=state, is_writing=is_writing)]
    return Condition(
        state=state,
        age_s=age_s,
        stale_s=stale_s,
        notes=tuple(
            note.replace(f"{run.path}/", "").replace(run.path, run.folder) for note in notes if note
        ),
        alarms=tuple(_alarms(figures)),
    )


def _alarms(figures: Figures) -> list[str]:
    alarms = []
    step, loss = figures.losses[-1] if figures.losses else (0, 0.0)
    if not math.isfinite(loss):
        alarms.append(f"the loss is {loss} at step {step:,}")
    if figures.totals.num_failed:
        alarms.append(f"{counted(figures.totals.num_failed, 'save')} failed")
    return alarms


def _state(
    latest: ReadResult, time: float, *, age_s: float | None, stale_s: float | None, is_writing: bool
) -> tuple[State, str]:
    """Return the state of a run and the reason for it.

    `time`: current Unix time. `age_s` and `stale_s`: see `Condition`. `is_writing`: whether a save
    is being written.
    """
    figures = latest.figures
    if latest.time and time - latest.time > max(HANG_S, 3 * latest.pause_s):
        return "unreadable", f"the folder hangs: not read for {spelled_age(time - latest.time)}"
    if latest.history is None and not latest.is_missing:
        return "unreadable", latest.problem or ""
    if latest.history is None:
        return ("gone" if latest.was_seen else "never saved"), latest.problem or ""
    if figures.damaged:
        return "damaged", _problem_of(figures.damaged[-1])
    if figures.unreadable:
        return "unreadable", _problem_of(figures.unreadable[-1])
    if figures.is_finished:
        return "finished", ""
    if figures.newest is None:
        return ("saving" if is_writing else "never saved"), "no checkpoint to resume from"
    if age_s is not None and stale_s is not None and age_s > stale_s:
        return "stale", f"no save for {spelled_age(age_s)}, the limit is {spelled_age(stale_s)}"
    return ("saving" if is_writing else "good"), ""


def _problem_of(row: CheckpointRow) -> str:
    return f"{row.name}: {' '.join(_FOLDER.sub('', row.problem or '').split())}"


def _facts(figures: Figures, time: float, *, state: State, is_writing: bool) -> list[str]:
    facts = []
    bad = figures.damaged or figures.unreadable
    if bad and state in ("damaged", "unreadable"):
        facts += [f"{len(bad) - 1} more {state}"] if len(bad) > 1 else []
        if figures.newest is None:
            facts.append("no checkpoint to resume from")
        else:
            facts.append(f"a resume takes step {figures.newest.step:,}")
    if is_writing:
        facts.append("a save is being written")
    elif figures.num_unfinished:
        facts.append(f"{counted(figures.num_unfinished, 'leftover')} of killed saves")
    if state in ("good", "saving", "finished", "stale") and figures.newest is not None:
        facts.append(_verification(figures, time))
    if figures.tier is not None:
        facts.append(_replicas(figures.tier))
    return facts


def _replicas(tier: TierView) -> str:
    """Return a note on the hosts that have the files of the newest step in the fast tier."""
    if tier.step is None:
        return "this machine sees no checkpoint in its fast tier"
    step = f"local step {tier.step:,}"
    if tier.num_seen < tier.num_files:
        return (
            f"{tier.num_seen} of {tier.num_files} files of {step} are on the hosts seen from here"
        )
    if tier.copies > 1:
        return f"each file of {step} is on {tier.copies} hosts"
    return f"{step} has no replica"


def _verification(figures: Figures, time: float) -> str:
    """Return a note that says when the newest good checkpoint was last verified."""
    if figures.checked_at is not None:
        return f"verified by a resume {spelled_age(time - figures.checked_at)} ago"
    if figures.saved_at is None:
        return "not verified since it was saved"
    return f"not verified since its save {spelled_age(time - figures.saved_at)} ago"
