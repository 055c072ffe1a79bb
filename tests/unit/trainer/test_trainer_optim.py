"""Learning rates, gradient clipping, and settings overridden by a checkpoint."""

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
    """Return the factor of the learning rate at each step."""
    factor = lr_curve(config, steps)
    return [round(factor(step), 6) for step in range(steps)]


def test_the_learning_rate_warms_up_stays_constant_and_decays() -> None:
    """Method: 10 steps, 2 of warm-up, 3 of decay."""
    config = LRSchedulerConfig(warmup_steps=2, decay_ratio=0.3)
    assert curve(config, 10) == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_decay_ratio_of_zero_keeps_the_learning_rate_constant() -> None:
    """Method: all factors after the warm-up."""
    assert curve(LRSchedulerConfig(warmup_steps=1, decay_ratio=0.0), 5) == [1, 1, 1, 1, 1]


def test_by_default_the_decay_starts_at_the_end_of_the_warm_up() -> None:
    """Method: one step of warm-up, 4 of decay."""
    assert curve(LRSchedulerConfig(warmup_steps=1), 5) == [1, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize("kind", ["linear", "sqrt", "cosine"])
def test_every_decay_ends_at_the_minimum_learning_rate(kind: str) -> None:
    """Method: factors never rise, and reach the minimum after the last step."""
    config = LRSchedulerConfig(warmup_steps=0, decay_type=kind, min_lr_factor=0.1)  # type: ignore[arg-type]
    factors = [lr_curve(config, 20)(step) for step in range(21)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(0.1)


def test_a_warm_up_longer_than_the_run_is_shortened() -> None:
    """Method: 200 steps of warm-up in a run of 4."""
    assert curve(LRSchedulerConfig(), 4) == [0.25, 0.5, 0.75, 1]


def test_a_resume_with_more_steps_follows_the_new_schedule_at_once() -> None:
    """Method: the state after the last of 4 steps, where the rate is 0, loaded into a run of 8.

    The state goes through JSON, since it must contain only plain values.
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


def test_only_gradients_above_the_norm_are_clipped() -> None:
    """Method: a gradient of norm 5, clipped to 1, to 10 and not at all."""
    for max_norm, clipped in ((1.0, 1.0), (10.0, 5.0), (0.0, 5.0)):
        model = nn.Linear(2, 1, bias=False)
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradients([model], max_norm, ALONE).item() == pytest.approx(5.0)
        assert model.weight.grad.norm().item() == pytest.approx(clipped, rel=1e-5)


def test_settings_that_a_checkpoint_overrides_are_listed() -> None:
    """Method: the state of an optimizer with another learning rate and other betas."""
    model = nn.Linear(2, 2)
    old = build_optimizers([model], OptimizerConfig(lr=1.0, betas=(0.5, 0.6)))
    build_schedulers(old, LRSchedulerConfig(), 10)
    config = OptimizerConfig(lr=2.0)
    new = build_optimizers([model], config)
    build_schedulers(new, LRSchedulerConfig(), 10)
    assert overridden_settings(new, config) == []
    new[0].load_state_dict(old[0].state_dict())
    assert overridden_settings(new, config) == [
        "`optimizer.betas`: the checkpoint's (0.5, 0.6) is used in place of the configured "
        "(0.9, 0.95)",
        "`optimizer.lr`: the checkpoint's 1.0 is used in place of the configured 2.0",
    ]
