"""An interrupt ends the rank that it came to, and is an error on the other ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.comm import Ranks, Solo, gather_and_run, run_on_all, run_on_rank_0
from holdfast.errors import RankError
from holdfast.manager.retention import Retainer
from holdfast.testing.ranks import try_ranks

INTERRUPTS = [KeyboardInterrupt, SystemExit]

COLLECTIVES: dict[str, Callable[[Ranks, Callable[[], None]], object]] = {
    "gather_and_run": lambda ranks, work: gather_and_run(ranks, 1, lambda _: work()),
    "run_on_rank_0": run_on_rank_0,
    "run_on_all": run_on_all,
}


@pytest.mark.parametrize("interrupt", INTERRUPTS)
@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("size", [1, 3])
def test_an_interrupt_of_rank_0_ends_it_and_fails_the_others(
    size: int, name: str, interrupt: type[BaseException]
) -> None:
    """Method: the work of rank 0 is interrupted, in each function that runs work on rank 0."""

    def collective(ranks: Ranks) -> object:
        def work() -> None:
            if ranks.rank == 0:
                raise interrupt

        return COLLECTIVES[name](ranks, work)

    if size == 1:
        with pytest.raises(interrupt):
            collective(Solo())
    own, *others = try_ranks(size, collective)
    assert type(own) is interrupt
    for other in others:
        assert isinstance(other, RankError)
        assert f"interrupted by {interrupt.__name__}" in other.what


@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_a_save_that_is_interrupted_raises_the_interrupt(
    interrupt: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: the interrupt comes while rank 0 makes the folder of the attempt. The next save to
    the same path succeeds."""
    make_folder = os.mkdir

    def interrupted(path: Any, *args: Any, **options: Any) -> None:
        if "attempt" in str(path):
            raise interrupt
        make_folder(path, *args, **options)

    state = {"weight": torch.ones(2)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", interrupted)
        with pytest.raises(interrupt):
            holdfast.save(tmp_path / "checkpoint", state)
    holdfast.save(tmp_path / "checkpoint", state)


def test_an_interrupt_of_retention_is_not_logged_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: the interrupt comes when a save lists the folder for checkpoints to delete."""
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=2)
    with CheckpointManager(tmp_path, model=torch.nn.Linear(2, 2), config=config) as manager:
        manager.save(1)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Retainer, "_removable", interrupted)
            with pytest.raises(KeyboardInterrupt):
                manager.save(2)
        manager.save(3)
    assert holdfast.check(tmp_path / "step-3") == []
