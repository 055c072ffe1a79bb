"""Saves that overlap with training: what optimizers wait for, and saves that overlap each other."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.comm import Ranks
from holdfast.saving.background import NICENESS, Background, lower_priority
from holdfast.saving.stage import Staging
from holdfast.testing.ranks import run_ranks

WIDTH = 1500
"""Parameters and their Adam state take 27 MB: a copy is still under way when `save` returns."""


class Counted(nn.Module):
    """A layer, and a buffer that changes without an optimizer."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(WIDTH, WIDTH))
        # Ranks are threads that share one generator, and must draw the same weights.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)


@contextmanager
def overlapped(
    folder: Path, ranks: Ranks | None = None, **settings: Any
) -> Iterator[tuple[Counted, torch.optim.Optimizer, CheckpointManager]]:
    model = Counted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    given: dict[str, Any] = {"async_mode": "async_with_pinned_mem", "interval": 1} | settings
    config = CheckpointConfig(enable=True, **given)
    with CheckpointManager(
        folder, model=model, optimizers=optimizer, config=config, ranks=ranks
    ) as manager:
        yield model, optimizer, manager


def change(model: Counted, optimizer: torch.optim.Optimizer) -> None:
    """Change parameters by a step of the optimizer, and the buffer without it."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        model.seen += 1


def state_of(model: Counted, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    slots = optimizer.state[model.layer.weight]
    tensors = {"layer.weight": model.layer.weight, "layer.bias": model.layer.bias}
    state = {f"optimizer.state.layer.weight.{slot}": value for slot, value in slots.items()}
    state |= {"seen": model.seen, **tensors}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.mark.parametrize("size", [1, 2])
def test_an_overlapping_save_holds_the_state_at_the_call_of_save(tmp_path: Path, size: int) -> None:
    """G1, G2: everything changes as soon as `save` returns, parameters by the optimizer's own step.
    The checkpoint holds the earlier values."""

    def work(ranks: Ranks) -> list[dict[str, torch.Tensor]]:
        expected = []
        with overlapped(tmp_path, ranks) as (model, optimizer, manager):
            change(model, optimizer)
            for step in range(1, 6):
                expected.append(state_of(model, optimizer))
                manager.save(step)
                change(model, optimizer)
        return expected

    expected = run_ranks(size, work)
    for number, state in enumerate(expected[0]):
        checkpoint = holdfast.open(tmp_path / f"step-{number + 1}")
        for name, value in state.items():
            assert torch.equal(checkpoint.read(name), value), name


def test_waiting_for_a_copy_ends_when_it_is_made_or_fails() -> None:
    """G7. Method: a thread that copies as slowly as the test lets it; then one that fails."""
    allowed, copied = threading.Event(), []

    def copy() -> None:
        allowed.wait()
        copied.append(1)

    def fail() -> None:
        raise ZeroDivisionError

    staging = Staging(copy)
    thread, waiting = threading.Thread(target=staging.run), threading.Thread(target=staging.wait)
    thread.start()
    waiting.start()
    assert waiting.is_alive()
    allowed.set()
    waiting.join()
    thread.join()
    assert copied == [1]

    failing = Staging(fail)
    with pytest.raises(ZeroDivisionError):
        failing.run()
    failing.wait()


def test_optimizers_wait_until_the_manager_is_closed(tmp_path: Path) -> None:
    """G2: closing the manager removes the hook that it has added to the optimizer."""
    with overlapped(tmp_path) as (_, optimizer, manager):
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        manager.save(1)
        manager.wait_for_staging()
        manager.wait_for_staging()
    assert not optimizer._optimizer_step_pre_hooks


class Holder:
    """An object whose state has other objects in it."""

    def __init__(self, **held: Any) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [self.held]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


@pytest.mark.parametrize("where", ["states", "inside of an object", "container"])
def test_an_optimizer_anywhere_in_the_state_waits_for_staging(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G15. Method: a second model and its optimizer are in `states`, in an object there, or in an
    optimizer that holds others. It steps as soon as `save` returns, before the copy in the
    background begins."""
    begin = Staging.run

    def run_late(staging: Staging) -> None:
        time.sleep(0.5)
        begin(staging)

    monkeypatch.setattr(Staging, "run", run_late)
    first, second = Counted(), Counted()
    optimizer = torch.optim.AdamW(first.parameters(), lr=1.0)
    own = torch.optim.AdamW(second.parameters(), lr=1.0)
    change(first, optimizer)
    change(second, own)
    states: dict[str, Any] = {"second": second, "own": own}
    if where == "inside of an object":
        states["own"] = Holder(own=own)
    elif where == "container":
        states["own"] = Container(own)
    expected = [state_of(second, own)[name] for name in ("layer.weight", "layer.bias")]
    slots = [slot.clone() for slot in own.state[second.layer.weight].values()]
    config = CheckpointConfig(enable=True, interval=1, async_mode="async_with_pinned_mem")
    with CheckpointManager(
        tmp_path, model=first, optimizers=optimizer, states=states, config=config
    ) as manager:
        for step in (1, 2):
            manager.save(step)
            if step == 2:
                change(second, own)
    found = holdfast.open(tmp_path / "step-2")
    for name, value in zip(("second.layer.weight", "second.layer.bias"), expected, strict=True):
        assert torch.equal(found.read(name), value), name
    names = [name for name in found.names() if name.startswith("own.")]
    for slot, value in zip(own.state[second.layer.weight], slots, strict=True):
        kept = [found.read(n) for n in names if n.endswith(f".{slot}") and n in found.tensors]
        assert any(torch.equal(one, value) for one in kept), slot


class Container(torch.optim.Optimizer):
    """An optimizer whose state is that of another optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)

    def state_dict(self) -> Any:
        return {"inner": self.inner.state_dict()}


def slow(folder: Path, **settings: Any) -> Any:
    """A manager whose saves take about a second each."""
    return overlapped(folder, write_bandwidth_limit=20.0, **settings)


def test_saves_write_no_faster_than_the_limit(tmp_path: Path) -> None:
    """Method: the duration of the write in the manifest is at least the bytes divided by the limit,
    on any machine, up to the time between two clocks."""
    with slow(tmp_path) as (*_, manager):
        manager.save(1)
    manifest = holdfast.open(tmp_path / "step-1").manifest
    assert manifest.timings["write"].most >= 0.99 * manifest.nbytes / 20e6


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_a_save_waits_for_the_save_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """G2: by default. The log says how long."""
    with caplog.at_level(logging.INFO, "holdfast"), slow(tmp_path) as (*_, manager):
        assert all(manager.save(step) for step in (1, 2))
    assert steps_in(tmp_path) == [1, 2]
    assert "s for the save in the background" in caplog.text


def test_a_save_may_be_skipped_while_one_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G2: `on_save_overlap = "skip"`. The log says so."""
    with slow(tmp_path, on_save_overlap="skip") as (*_, manager):
        assert [manager.save(step) for step in (1, 2, 3)] == [True, False, False]
        manager.wait()
        assert manager.save(4)
    assert steps_in(tmp_path) == [1, 4]
    assert "step 3 is not saved: the save before it is still being written" in caplog.text


def test_a_save_may_be_queued_while_one_is_written(tmp_path: Path) -> None:
    """G2: `on_save_overlap = "queue"` saves the step that is reached when the save before is
    done."""
    with slow(tmp_path, on_save_overlap="queue", interval=2) as (*_, manager):
        assert [manager.save(step) for step in (2, 3, 4, 5)] == [True, False, False, False]
        manager.wait()
        assert manager.save(7), "owed since step 4"
        manager.wait()
        assert not manager.save(9), "and no more"
    assert steps_in(tmp_path) == [2, 7]


def test_the_last_step_is_saved_even_while_another_save_is_written(tmp_path: Path) -> None:
    """G2: also with `on_save_overlap = "skip"`."""
    with slow(tmp_path, on_save_overlap="skip") as (*_, manager):
        assert manager.save(1)
        assert manager.save(2, last_step=True)
    assert steps_in(tmp_path) == [1, 2]


def test_background_threads_have_a_lower_priority_than_training() -> None:
    """Method: the niceness of the thread, from the system."""
    found: list[int] = []
    background = Background()

    def note() -> None:
        lower_priority()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    background.start(note)
    background.wait()
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert found == [min(here + NICENESS, 19)]


def test_goodput_says_where_the_time_went(tmp_path: Path) -> None:
    """Method: the line that a run logs at its end."""
    with overlapped(tmp_path) as (*_, manager):
        manager.load()
        manager.save(1)
        manager.save(2)
    said = manager.goodput()
    assert said.startswith("goodput ")
    for cause in ("training", "resuming", "saving", "waiting for the save before"):
        assert cause in said
    assert manager.blocked_s > 0
