"""Schedulers as one component: one, several with equal states, several with different states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import MismatchError, UsageError
from holdfast.state.objects import StateTree
from holdfast.state.same import same
from holdfast.state.schedulers import SchedulerState

LR = torch.optim.lr_scheduler


class Phases:
    """A scheduler with any state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def saved(where: Path, *schedulers: Any) -> None:
    holdfast.save(where, {"lr_scheduler": SchedulerState(schedulers), "x": torch.ones(1)})


def loaded(where: Path, *schedulers: Any) -> None:
    holdfast.load(where, {"lr_scheduler": SchedulerState(schedulers)})


@pytest.mark.parametrize(
    "state", [{"0": {"lr": 0.1}, "1": {"lr": 0.2}}, {0: {"a": 1}, 1: {"a": 2}}, {"0": 1}, {}]
)
def test_a_scheduler_with_numbers_for_keys_gets_its_whole_state(state: Any, tmp_path: Path) -> None:
    """G15. Method: one, and two with equal states; loaded by the same number, and by others."""
    for number in (1, 2):
        saved(tmp_path / f"{number}", *(Phases(state) for _ in range(number)))
        for count in (1, 2, 3):
            fresh = [Phases({}) for _ in range(count)]
            loaded(tmp_path / f"{number}", *fresh)
            assert all(same(one.state, state) for one in fresh)


def made(count: int) -> list[Any]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    return [LR.StepLR(optimizer, 2 + number) for number in range(count)]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_different_schedulers_load_only_into_as_many_schedulers(tmp_path: Path) -> None:
    """G15. Method: two of torch's; one and three are listed as a mismatch, nothing changes; stock
    DCP reads the same names."""
    two = made(2)
    two[0].step()
    saved(tmp_path / "two", *two)
    names = {*holdfast.open(tmp_path / "two").manifest.values}
    assert {"lr_scheduler.0.last_epoch", "lr_scheduler.1.step_size"} <= names
    again = made(2)
    loaded(tmp_path / "two", *again)
    assert [one.state_dict() for one in again] == [one.state_dict() for one in two]
    for count in (1, 3):
        others = made(count)
        with pytest.raises(MismatchError, match=rf"2 different schedulers.*, {count} here"):
            loaded(tmp_path / "two", *others)
        assert [one.last_epoch for one in others] == [0] * count


def test_objects_under_numbers_in_one_scheduler_are_refused_at_the_save() -> None:
    """G15. Method: a state that a load would take for those of several schedulers."""
    state = {"0": Phases(1), "1": Phases(2)}
    tree = StateTree({"lr_scheduler": SchedulerState([Phases(state)])})
    with pytest.raises(UsageError, match="which a load would take for several"):
        tree.flatten()
