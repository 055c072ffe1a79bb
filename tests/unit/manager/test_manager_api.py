"""What a training loop and other frameworks ask of a `CheckpointManager`."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.manager.resumed import Resumed
from holdfast.storage.memory import MemoryStore


def manager(folder: Path | None, **arguments: Any) -> CheckpointManager:
    model = nn.Linear(3, 3)
    config = CheckpointConfig(enable=True, interval=10, **arguments.pop("settings", {}))
    return CheckpointManager(folder, model=model, config=config, **arguments)


def test_load_says_where_the_state_comes_from(tmp_path: Path) -> None:
    """Nothing, a seed, a checkpoint, and initial weights; each is an int."""
    with manager(tmp_path / "a") as fresh:
        nothing = fresh.load()
        assert (nothing, nothing.source, nothing.where) == (0, "nothing", None)
        fresh.save_seed()
    with manager(tmp_path / "a") as seeded:
        seed = seeded.load()
        assert (seed, seed.source, seed.where) == (0, "seed", str(tmp_path / "a/step-0"))
        seeded.save(10)
    with manager(tmp_path / "a") as again:
        resumed = again.load()
        assert (resumed, resumed.source) == (10, "checkpoint")
        assert resumed.where == str(tmp_path / "a/step-10")
        assert f"{resumed} {resumed}" == "10 10"
        assert range(resumed + 1, 13) == range(11, 13)
        assert pickle.loads(pickle.dumps(resumed)).where == resumed.where
        assert repr(resumed) == f"Resumed(step=10, source='checkpoint', where={resumed.where!r})"
    settings = {"initial_load_path": str(tmp_path / "a/step-10")}
    with manager(tmp_path / "b", settings=settings) as other:
        initial = other.load()
        assert (initial, initial.source) == (0, "initial")
    assert Resumed(3).step == 3


def test_force_saves_a_step_that_is_not_due(tmp_path: Path) -> None:
    with manager(tmp_path) as run:
        run.load()
        assert run.steps() == []
        assert run.latest_step() is None
        assert not run.save(3)
        assert run.save(4, force=True)
        assert run.steps() == [4]
        assert run.latest_step() == 4
        with pytest.raises(holdfast.UsageError, match="`force` must be True or False"):
            run.save(5, force="yes")  # type: ignore[arg-type]


def test_latest_step_passes_over_what_cannot_be_resumed_from(tmp_path: Path) -> None:
    with manager(tmp_path, settings={"last_save_model_only": True}) as run:
        run.load()
        run.save(10)
        run.save(20)
        run.save(25, last_step=True)
        assert run.steps() == [10, 20, 25]
        assert run.latest_step() == 20
        next((tmp_path / "step-20").glob("*.distcp")).unlink()
        assert run.latest_step() == 10


def test_a_stop_can_return(tmp_path: Path) -> None:
    """`on_stop="return"`: the save happens, and the loop ends itself."""
    saved = []
    with manager(tmp_path, on_stop="return") as run:
        run.load()
        for step in range(1, 10):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            saved.append(run.save(step))
            if run.stop_requested:
                break
    assert saved == [False, False, False, True]
    assert run.steps() == [4]


def test_on_saved_is_called_for_each_durable_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for background saves; its errors are logged and change nothing."""
    seen: list[tuple[int, str, Mapping[str, float]]] = []

    def note(step: int, path: str, metrics: Mapping[str, float]) -> None:
        assert holdfast.check(path) == []
        seen.append((step, path, metrics))
        if step == 20:
            raise RuntimeError("no network")

    with manager(tmp_path, on_saved=note, settings={"async_mode": "async"}) as run:
        run.load()
        for step in (10, 20, 30):
            assert run.save(step, metrics={"loss": 1 / step})
    assert [step for step, _, _ in seen] == [10, 20, 30]
    assert seen[0][1:] == (str(tmp_path / "step-10"), {"loss": 0.1})
    assert "step 20 is saved, but `on_saved` failed" in caplog.text
    assert "no network" in caplog.text


def test_a_store_in_place_of_a_folder() -> None:
    store = MemoryStore()
    with manager(None, store=store) as run:
        run.load()
        run.save(10)
    with manager(None, store=store) as again:
        assert again.load() == 10
    with pytest.raises(holdfast.UsageError, match="`folder` and `store` are both given"):
        manager(Path("x"), store=store)
    with pytest.raises(holdfast.UsageError, match="`folder`"):
        manager(None)
    with pytest.raises(holdfast.UsageError, match="`store` must be a"):
        manager(None, store=object())


class Container:
    """Holds an optimizer, as frameworks do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.num_loads = 0

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"lr": self.optimizer.param_groups[0]["lr"], "scale": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.param_groups[0]["lr"] = state["lr"]
        self.num_loads += 1


def test_an_object_that_holds_optimizers(tmp_path: Path) -> None:
    """Its own `state_dict` is saved under `optimizer`."""
    model = nn.Linear(3, 3)
    config = CheckpointConfig(enable=True, interval=10)

    def run(lr: float) -> tuple[CheckpointManager, Container]:
        container = Container(torch.optim.SGD(model.parameters(), lr=lr))
        return (
            CheckpointManager(tmp_path, model=model, optimizers=container, config=config),
            container,
        )

    first, _ = run(0.5)
    with first:
        first.load()
        first.save(10)
    second, container = run(0.1)
    with second:
        assert second.load() == 10
    assert container.num_loads == 1
    assert container.optimizer.param_groups[0]["lr"] == 0.5
    assert "optimizer.scale" in holdfast.open(tmp_path / "step-10")


def test_names_of_components_may_be_the_callers(tmp_path: Path) -> None:
    """An object under `lr_scheduler` or `dataloader`, where no argument has that name."""

    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    states = {"lr_scheduler": Counter(), "dataloader": Counter()}
    for counter in states.values():
        counter.count = 7
    with manager(tmp_path, states=states) as run:
        run.load()
        run.save(10)
    opened = holdfast.open(tmp_path / "step-10")
    assert opened.value("lr_scheduler.count") == 7
    assert opened.value("dataloader.count") == 7


def test_settings_from_a_mapping() -> None:
    config = CheckpointConfig.from_mapping({"enable": True, "stop_signals": ["SIGTERM"]})
    assert config.stop_signals == ("SIGTERM",)
    with pytest.raises(holdfast.UsageError, match="`intervall` is no key") as unknown:
        CheckpointConfig.from_mapping({"intervall": 5})
    assert unknown.value.hint == "did you mean `interval`?"
    with pytest.raises(holdfast.UsageError, match=r"`checkpoint\.interval` must be"):
        CheckpointConfig.from_mapping({"interval": "often"})
    with pytest.raises(holdfast.UsageError, match="must be a mapping"):
        CheckpointConfig.from_mapping(7)  # type: ignore[arg-type]
