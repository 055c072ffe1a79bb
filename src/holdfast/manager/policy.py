"""Decisions without side effects: when and what to save, and which checkpoints to delete."""

from __future__ import annotations

import math
import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from holdfast.format.manifest import Kind
from holdfast.manager.config import CheckpointConfig


class Progress(NamedTuple):
    """Measurements of one rank after a step, or the maximum of each measurement over all ranks."""

    steps: float = 0
    """Steps since the last save, or since the run began."""

    seconds: float = 0
    """Seconds since the last save, or since the run began."""

    step_s: float = 0
    """Average duration of a step; 0 before the first step."""

    save_s: float = 0
    """Average time for which a save blocks training; 0 before the first save."""

    full_save_s: float = 0
    """Longest duration of a full save until it was durable; 0 before the first full save."""

    model_share: float = 0
    """Share of the model in the bytes of a full checkpoint."""

    failed: float = 0
    """1 if the background save has failed, else 0."""

    busy: float = 0
    """1 while the previous save is being written, else 0."""

    draining: float = 0
    """1 while a checkpoint is or will be copied from the fast tier to the run's folder, else 0."""

    lacks_memory: float = 0
    """1 after the first step if page-locked memory must be reserved for snapshots, else 0."""

    signal: float = 0
    """Number of a stop signal that was received; 0 if there is none."""

    signal_age_s: float = 0
    """Seconds since the signal was received; 0 if there is none."""


def is_due(step: int, *, last_step: bool, config: CheckpointConfig, progress: Progress) -> bool:
    """Return whether to save the state after this step."""
    if not config.enable or config.load_only:
        return False
    first = step == 1 and config.enable_first_step_checkpoint
    late = 0 < config.interval_minutes * 60 <= progress.seconds
    if last_step or first or late:
        return True
    if config.interval == "auto":
        return progress.steps >= best_interval(config, progress)
    return step % config.interval == 0


def best_interval(config: CheckpointConfig, progress: Progress) -> int:
    """Return the number of steps between saves that minimizes the time lost to saves and to work
    that is repeated after failures.

    The first-order optimum is a save every `sqrt(2 * save time * mean time between failures)`:
    J. W. Young, A first order approximation to the optimum checkpoint interval, Communications of
    the ACM 17(9), 1974; J. T. Daly, A higher order estimate of the optimum checkpoint interval for
    restart dumps, Future Generation Computer Systems 22(3), 2006. Before the first save, returns
    `min_interval`.
    """
    if not progress.save_s or not progress.step_s:
        return config.min_interval
    seconds = math.sqrt(2 * progress.save_s * config.mtbf_hours * 3600)
    return min(max(round(seconds / progress.step_s), config.min_interval), config.max_interval)


def kind_in_time(left_s: float, full_save_s: float, model_share: float) -> Kind | None:
    """Return the most complete kind of save that fits into `left_s` seconds; None if none fits.

    `full_save_s`: duration of the slowest full save so far. Before the first full save it is 0, so
    a full save is tried if any time is left. `model_share`: fraction of a full save's bytes that
    belong to the model.
    """
    if full_save_s < left_s:
        return "full"
    return "model" if full_save_s * model_share < left_s else None


def stopping_line(
    number: int, step: int, left_s: float, full_save_s: float, kind: Kind | None
) -> str:
    """Return the log line about the stop signal `number` and the save of `step` after it. `left_s`,
    `full_save_s`: arguments of `kind_in_time`. `kind`: its result."""
    name = signal.Signals(number).name
    if kind == "full":
        return f"{name}: saving step {step}, then ending"
    instead = "the model alone" if kind == "model" else "nothing: the newest checkpoint remains"
    return (
        f"{name}: {left_s:.1f} s are left, a save takes {full_save_s:.1f} s; "
        f"saving {instead}, then ending"
    )


STEPS_MIN = 2
"""Number of newest resumable checkpoints that are never deleted. If only one were kept, a single
damaged file could end the run."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Retention rules. A checkpoint is kept if any rule keeps it."""

    latest_k: int
    """Number of newest checkpoints to keep; 0 keeps all."""

    every_n_steps: int = 0
    """Number whose multiples are steps to keep; 0 turns the rule off."""

    best_k: int = 0
    """Number of checkpoints with the best metric to keep; 0 turns the rule off."""

    best_metric: str = "loss"
    """Name of the metric for `best_k`."""

    best_mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is best."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """The properties of a complete checkpoint that the retention rules need."""

    step: int
    resumable: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)
    pinned: bool = False


def reasons_to_keep(
    good: Iterable[Candidate], retention: Retention, *, protected: Collection[int] = ()
) -> dict[int, list[str]]:
    """Return the reasons to keep each checkpoint, by step, oldest first. A checkpoint without any
    reason may be deleted.

    `good` holds only complete checkpoints. Damaged checkpoints are neither counted nor deleted, so
    they never displace a good one. Steps in `protected` are always kept.
    """
    steps = sorted(good, key=lambda candidate: candidate.step)
    reasons: dict[int, list[str]] = {candidate.step: [] for candidate in steps}
    latest, every = steps[-retention.latest_k :], retention.every_n_steps
    for why, kept in (
        ("keep all" if retention.latest_k == 0 else f"latest {retention.latest_k}", latest),
        (f"every {every} steps", [c for c in steps if every and c.step % every == 0]),
        (f"best {retention.best_k} by {retention.best_metric}", _best(steps, retention)),
        ("pinned", [c for c in steps if c.pinned]),
        ("in use", [c for c in steps if c.step in protected]),
        ("to resume from", [c for c in steps if c.resumable][-STEPS_MIN:]),
    ):
        for candidate in kept:
            reasons[candidate.step].append(why)
    return reasons


def removable(
    good: Iterable[Candidate],
    retention: Retention,
    *,
    current: int | None = None,
    protected: Collection[int] = (),
) -> list[int]:
    """Return the steps to delete, oldest first. `good`, `protected`: see `reasons_to_keep`.

    `current`: step that the run has just saved. Later steps are neither counted nor deleted: the
    run abandoned them when it went back to an earlier step by an explicit `load_step`.
    """
    ours = [c for c in good if current is None or c.step <= current]
    reasons = reasons_to_keep(ours, retention, protected=protected)
    return [step for step, why in reasons.items() if not why]


def _best(steps: Sequence[Candidate], retention: Retention) -> list[Candidate]:
    """Return the `best_k` best checkpoints by the metric. Of two checkpoints with equal values, the
    newer one is better. Checkpoints without the metric, or with NaN, are left out."""
    sign = 1 if retention.best_mode == "max" else -1
    metric = retention.best_metric
    measured = [c for c in steps if not math.isnan(c.metrics.get(metric, math.nan))]
    measured.sort(key=lambda c: (sign * c.metrics[metric], c.step), reverse=True)
    return measured[: retention.best_k]
