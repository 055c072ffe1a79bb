"""Decisions about steps, as values: when to save, and which steps may go."""

from __future__ import annotations

import math
import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from holdfast.errors import ExistsError
from holdfast.format.manifest import Kind
from holdfast.manager.config import CheckpointConfig


@dataclass(frozen=True, slots=True)
class Progress:
    """How a run stands between two saves; the same on all ranks."""

    steps: int = 0
    """Since the last save, or since the run began."""

    seconds: float = 0.0
    """Since then."""

    step_s: float = 0.0
    """That a step takes on average; 0 where none has been measured."""

    save_s: float = 0.0
    """That a save holds training up on average; 0 where none has been measured."""


def is_due(
    step: int, *, last_step: bool, config: CheckpointConfig, progress: Progress | None = None
) -> bool:
    """Whether the state after this step is saved."""
    if not config.enable or config.load_only:
        return False
    progress = progress or Progress()
    first = step == 1 and config.enable_first_step_checkpoint
    late = 0 < config.interval_minutes * 60 <= progress.seconds
    if config.interval == "auto":
        return last_step or first or late or progress.steps >= best_interval(config, progress)
    return last_step or first or late or step % config.interval == 0


def best_interval(config: CheckpointConfig, progress: Progress) -> int:
    """Steps between saves that lose the least time, to saving and to what a failure throws away.

    The first-order optimum, a save every `sqrt(2 * save time * mean time between failures)`: J. W.
    Young, A first order approximation to the optimum checkpoint interval, Communications of the ACM
    17(9), 1974; J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart
    dumps, Future Generation Computer Systems 22(3), 2006. Until a save has been measured it is the
    shortest interval allowed.
    """
    if not progress.save_s or not progress.step_s:
        return config.min_interval
    seconds = math.sqrt(2 * progress.save_s * config.mtbf_hours * 3600)
    return min(max(round(seconds / progress.step_s), config.min_interval), config.max_interval)


def kind_of_save(*, last_step: bool, config: CheckpointConfig) -> Kind:
    """What the step is to hold."""
    return "model" if last_step and config.last_save_model_only else "full"


def check_seed(steps: Sequence[int], where: str) -> None:
    """Refuse to save a seed beside other steps.

    Raises:
        ExistsError: the folder holds steps.
    """
    if steps:
        raise ExistsError(
            f"`{where}` holds step {steps[-1]}: a seed is the first step",
            hint="choose another `checkpoint.folder`, or remove this one",
        )


def kind_in_time(left_s: float, full_save_s: float, model_share: float) -> Kind | None:
    """The most that can be saved in `left_s`; None where there is no time for anything.

    `full_save_s` is how long a full save has taken at most (0: none has been measured, and a full
    one is tried while there is any time), `model_share` the model's part of its bytes.
    """
    if full_save_s < left_s:
        return "full"
    return "model" if full_save_s * model_share < left_s else None


def stopping_line(
    number: int, step: int, left_s: float, full_save_s: float, kind: Kind | None
) -> str:
    """The line of the log on what a signal makes of this step: see `kind_in_time`."""
    name = signal.Signals(number).name
    if kind == "full":
        return f"{name}: saving step {step}, then ending"
    instead = "the model alone" if kind == "model" else "nothing: the newest step stands"
    return (
        f"{name}: {left_s:.1f} s are left, a save takes {full_save_s:.1f} s; "
        f"saving {instead}, then ending"
    )


STEPS_MIN = 2
"""Newest steps to resume from that no rule lets go: with one alone, one damaged file would be the
end."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Which steps stay: all that any of these rules keeps."""

    latest_k: int
    """The newest of them; 0 keeps all there are."""

    every_n_steps: int = 0
    """Those whose number it divides; 0: none for that reason."""

    best_k: int = 0
    """Those with the best metric; 0: none for that reason."""

    best_metric: str = "loss"
    """Name of that metric."""

    best_mode: Literal["min", "max"] = "min"
    """Whether less is better, or more."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A step that is known to be whole, with what retention asks of it."""

    step: int
    resumable: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)
    pinned: bool = False


def retention_of(config: CheckpointConfig) -> Retention:
    """What the `[checkpoint]` section says of keeping steps."""
    return Retention(
        latest_k=config.keep_latest_k,
        every_n_steps=config.keep_every_n_steps,
        best_k=config.keep_best_k,
        best_metric=config.keep_best_metric,
        best_mode=config.keep_best_mode,
    )


def reasons_to_keep(
    good: Iterable[Candidate], retention: Retention, *, protected: Collection[int] = ()
) -> dict[int, list[str]]:
    """Why each step stays, oldest step first; one without a reason may go.

    `good` are the steps known to be whole, and no others: a damaged one is neither counted nor
    removed, so that it can never push a good one out. `protected` are never removed.
    """
    steps = sorted(good, key=lambda candidate: candidate.step)
    reasons: dict[int, list[str]] = {candidate.step: [] for candidate in steps}
    latest = steps[-retention.latest_k :]
    for why, kept in (
        ("keep all" if retention.latest_k == 0 else f"latest {retention.latest_k}", latest),
        (f"every {retention.every_n_steps} steps", _every(steps, retention.every_n_steps)),
        (f"best {retention.best_k} by {retention.best_metric}", _best(steps, retention)),
        ("pinned", [candidate for candidate in steps if candidate.pinned]),
        ("in use", [candidate for candidate in steps if candidate.step in protected]),
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
    """Steps that retention lets go, oldest first.

    Steps past `current` belong to another course of the run, which an explicit `load_step` has
    left: they are not counted and not removed.
    """
    ours = [c for c in good if current is None or c.step <= current]
    reasons = reasons_to_keep(ours, retention, protected=protected)
    return [step for step, why in reasons.items() if not why]


def _every(steps: Sequence[Candidate], every: int) -> list[Candidate]:
    return [candidate for candidate in steps if every and candidate.step % every == 0]


def _best(steps: Sequence[Candidate], retention: Retention) -> list[Candidate]:
    """The best by a metric, of equal ones the newer; a step without it, or whose metric is no
    number, is never among them."""
    sign = 1 if retention.best_mode == "max" else -1
    ranked = []
    for candidate in steps:
        value = candidate.metrics.get(retention.best_metric, math.nan)
        if not math.isnan(value):
            ranked.append((sign * value, candidate.step, candidate))
    ranked.sort(key=lambda entry: entry[:2], reverse=True)
    return [candidate for _, _, candidate in ranked[: retention.best_k]]
