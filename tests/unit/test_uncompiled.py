"""Calls from inside of compiled code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast


def run(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, mode: Any) -> Any:
    """A manager of a run that saves every step."""
    config = holdfast.CheckpointConfig(
        enable=True, interval=1, last_save_model_only=False, stop_signals=(), async_mode=mode
    )
    return holdfast.CheckpointManager(folder, model=model, optimizers=optimizer, config=config)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_compiled_function_saves_and_loads(tmp_path: Path) -> None:
    """G15. Method: `save`, `open` and `load` between operations that are compiled, each called
    twice: what is compiled gives its results, and the state comes back."""
    saved, loaded = nn.Linear(3, 3), nn.Linear(3, 3)

    def work(x: torch.Tensor) -> Any:
        y = x * 2
        holdfast.save(tmp_path / "x", {"model": saved, "y": y}, overwrite=True)
        z = y + holdfast.open(tmp_path / "x").read("y")
        holdfast.load(tmp_path / "x", {"model": loaded})
        return loaded(z)

    compiled = torch.compile(work, backend="eager")
    for number in (1.0, 2.0):
        with torch.no_grad():
            saved.weight += number
        found = compiled(torch.full((3,), number))
        assert torch.equal(saved.weight, loaded.weight)
        assert torch.equal(found, saved(torch.full((3,), number * 4)))


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_compiled_function_uses_a_manager(mode: Any, tmp_path: Path) -> None:
    """G15. Method: a manager that is made outside and used inside, in every mode."""
    saved, optimizer = trained()
    with run(saved, optimizer, tmp_path, mode) as manager:

        def step(x: torch.Tensor) -> Any:
            y = saved(x)
            manager.save(1)
            manager.wait_for_staging()
            return y + 1

        with torch.no_grad():
            found = torch.compile(step, backend="eager")(torch.ones(3))
        assert torch.equal(found, saved(torch.ones(3)) + 1)
    loaded, fresh = trained()
    with run(loaded, fresh, tmp_path, mode) as manager:
        assert torch.compile(lambda x: x + manager.load(), backend="eager")(torch.ones(1)) == 2
    assert all(map(torch.equal, saved.parameters(), loaded.parameters()))


def test_the_compiler_is_not_imported() -> None:
    """Method: a process that imports all entry points: the import of the compiler takes seconds."""
    code = (
        "import sys, holdfast; holdfast.save, holdfast.load, holdfast.open; "
        "holdfast.CheckpointManager; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
