"""Decisions about steps, as values: when to save, and which steps may go."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from holdfast.format.manifest import Kind
from holdfast.manager.config import CheckpointConfig


def is_due(step: int, *, last_step: bool, config: CheckpointConfig) -> bool:
    """Whether the state after this step is saved."""
    if not config.enable or config.load_only:
        return False
    first = step == 1 and config.enable_first_step_checkpoint
    return last_step or first or step % config.interval == 0


def kind_of_save(*, last_step: bool, config: CheckpointConfig) -> Kind:
    """What the step is to hold."""
    return "model" if last_step and config.last_save_model_only else "full"


def kind_in_time(left_s: float, full_save_s: float, model_share: float) -> Kind | None:
    """The most that can be saved in `left_s`; None where there is no time for anything.

    `full_save_s` is how long a full save has taken at most (0: none has been measured, and a full
    one is tried while there is any time), `model_share` the model's part of its bytes.
    """
    if full_save_s < left_s:
        return "full"
    return "model" if full_save_s * model_share < left_s else None


def removable(
    good: Sequence[int], *, current: int, keep_latest_k: int, protected: Collection[int] = ()
) -> list[int]:
    """Steps that retention lets go, oldest first.

    `good` are the steps known to be whole; a damaged one is neither counted nor removed, so that it
    can never push a good one out. Steps past `current` belong to another course of the run, which
    an explicit `load_step` has left: they are not counted and not removed either. `protected` are
    never removed.
    """
    if keep_latest_k == 0:
        return []
    ours = sorted(step for step in good if step <= current)
    return [step for step in ours[:-keep_latest_k] if step not in protected]
