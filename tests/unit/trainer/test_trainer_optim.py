"""Learning rates, clipping, and what a resume brings back."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from holdfast.trainer.config import LRSchedulerConfig, OptimizerConfig
from holdfast.trainer.optim import (
    apply_schedules,
    build_optimizers,
    build_schedulers,
    clip_gradients,
    lr_curve,
    overridden_settings,
)
from holdfast.trainer.parallel import ParallelContext

ALONE = ParallelContext(0, 1, torch.device("cpu"))


def curve(config: LRSchedulerConfig, steps: int) -> list[float]:
    """The share of the learning rate at each step."""
    share = lr_curve(config, steps)
    return [round(share(step), 6) for step in range(steps)]


def test_the_rate_rises_stays_and_falls() -> None:
    """Method: 10 steps, 2 of warm-up, the last 3 falling through quarters."""
    config = LRSchedulerConfig(warmup_steps=2, decay_ratio=0.3)
    assert curve(config, 10) == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_decay_ratio_of_zero_leaves_the_rate_level() -> None:
    """Method: all steps after the warm-up."""
    assert curve(LRSchedulerConfig(warmup_steps=1, decay_ratio=0.0), 5) == [1, 1, 1, 1, 1]


def test_by_default_the_rate_falls_from_the_end_of_the_warm_up() -> None:
    """Method: 4 steps after one of warm-up, in fifths."""
    assert curve(LRSchedulerConfig(warmup_steps=1), 5) == [1, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize("kind", ["linear", "sqrt", "cosine"])
def test_every_fall_ends_at_the_least_rate(kind: str) -> None:
    """Method: never up, never below, and there once the steps are over."""
    config = LRSchedulerConfig(warmup_steps=0, decay_type=kind, min_lr_factor=0.1)  # type: ignore[arg-type]
    shares = [lr_curve(config, 20)(step) for step in range(21)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.1)


def test_a_warm_up_longer_than_the_run_is_cut() -> None:
    """Method: 200 steps of warm-up in a run of 4."""
    assert curve(LRSchedulerConfig(), 4) == [0.25, 0.5, 0.75, 1]


def test_a_run_that_is_made_longer_follows_the_new_curve_at_once() -> None:
    """Method: the state after the last of 4 steps, where the rate is 0, loaded into a run of 8.

    The state passes through JSON: it holds plain values only.
    """
    config = OptimizerConfig(lr=1.0)
    old, new = (build_optimizers([nn.Linear(2, 2)], config) for _ in range(2))
    (schedule,) = build_schedulers(old, LRSchedulerConfig(warmup_steps=0), 4)
    for _ in range(4):
        old[0].step()
        schedule.step()
    assert old[0].param_groups[0]["lr"] == 0
    longer = build_schedulers(new, LRSchedulerConfig(warmup_steps=0), 8)
    longer[0].load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    apply_schedules(longer)
    assert new[0].param_groups[0]["lr"] == pytest.approx(1 - 5 / 9)


def test_gradients_are_scaled_to_the_norm_and_only_down() -> None:
    """Method: a gradient of norm 5, clipped to 1, to 10 and not at all."""
    for max_norm, left in ((1.0, 1.0), (10.0, 5.0), (0.0, 5.0)):
        model = nn.Linear(2, 1, bias=False)
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradients([model], max_norm, ALONE).item() == pytest.approx(5.0)
        assert model.weight.grad.norm().item() == pytest.approx(left, rel=1e-5)


def test_a_restored_value_that_the_configuration_has_otherwise_is_told() -> None:
    """Method: the state of an optimizer with another rate and other betas."""
    model = nn.Linear(2, 2)
    old = build_optimizers([model], OptimizerConfig(lr=1.0, betas=(0.5, 0.6)))
    build_schedulers(old, LRSchedulerConfig(), 10)
    config = OptimizerConfig(lr=2.0)
    new = build_optimizers([model], config)
    build_schedulers(new, LRSchedulerConfig(), 10)
    assert overridden_settings(new, config) == []
    new[0].load_state_dict(old[0].state_dict())
    assert overridden_settings(new, config) == [
        "`optimizer.betas`: (0.5, 0.6), which the step was saved with, is used; configured is "
        "(0.9, 0.95)",
        "`optimizer.lr`: 1.0, which the step was saved with, is used; configured is 2.0",
    ]
