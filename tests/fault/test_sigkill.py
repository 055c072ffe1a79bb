"""SIGKILL at random moments of real saves by real processes."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import holdfast
from extent import some
from processes import Job, run_processes

ROWS = 1 << 18


class Stamped(nn.Module):
    """A sharded tensor of 4 MiB, whose elements all equal the step in which it was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stamp", torch.zeros(ROWS, 4))


def save_for_ever(rank: int, size: int, folder: Path, async_mode: Any) -> None:
    """Resume, then save step after step until killed. Every third save replaces a step."""
    module = sharded(size)
    config = holdfast.CheckpointConfig(
        enable=True, interval=1, keep_latest_k=2, async_mode=async_mode
    )
    with holdfast.CheckpointManager(folder, model=module, config=config) as manager:
        step = manager.load()
        assert stamp_of(module) == {float(step)}, "a mix of steps was loaded"
        while True:
            step += 1
            module.stamp.fill_(step)  # type: ignore[operator]
            for _ in range(1 + (step % 3 == 0)):
                manager.save(step)


def load_once(rank: int, size: int, folder: Path) -> tuple[int, set[float]]:
    """Resume, and return the step and its stamps."""
    module = sharded(size)
    config = holdfast.CheckpointConfig(enable=True, interval=1, keep_latest_k=2)
    with holdfast.CheckpointManager(folder, model=module, config=config) as manager:
        return manager.load(), stamp_of(module)


def sharded(size: int) -> Stamped:
    module = Stamped()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        module.stamp = distribute_tensor(torch.zeros(ROWS, 4), mesh, [Shard(0)])
    return module


def stamp_of(module: Stamped) -> set[float]:
    """Return the distinct values in this rank's shard."""
    stamp: Any = module.stamp
    local = stamp.to_local() if isinstance(stamp, DTensor) else stamp
    return set(torch.unique(local).tolist())


def names(folder: Path) -> set[str]:
    """Return the names in a folder that may not exist yet."""
    return {path.name for path in folder.glob("*")}


def kill_again_and_again(
    folder: Path, *, size: int, kills: int, seed: int, async_mode: str
) -> None:
    """Kill repeatedly. After each kill, every checkpoint is complete and of one step, and the
    newest two of before, or newer ones, exist."""
    choose = random.Random(seed)
    newest = 0
    for _ in range(kills):
        before = names(folder)
        with Job(size, save_for_ever, folder, async_mode) as job:
            deadline = time.monotonic() + 60
            while names(folder) == before and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(choose.uniform(0.0, 0.25))
            # One rank or all at once. If one dies, the others must notice, and end their save.
            victims = range(size) if choose.random() < 0.5 else [choose.randrange(size)]
            job.kill(victims)
            job.wait(60)
        for path in folder.glob("step-*"):
            values = torch.unique(holdfast.open(path).read("stamp")).tolist()
            assert values == [float(path.name.removeprefix("step-"))], path
        found = run_processes(size, load_once, folder)
        assert len({step for step, _ in found}) == 1
        for step, stamps in found:
            assert stamps == {float(step)}
            assert step >= newest, "a published step was lost"
            newest = step
        left = [name for name in names(folder) if name.startswith((".attempt", ".removing"))]
        assert not left


@pytest.mark.parametrize(
    ("size", "async_mode"),
    some([(2, "async"), (1, "disabled"), (2, "disabled"), (1, "async")], 2),
)
def test_a_save_killed_at_any_moment_leaves_complete_checkpoints(
    size: int, async_mode: str, tmp_path: Path
) -> None:
    """G1, G2, G5. Method: 32 random kills of one rank or of all, in first saves, saves that replace
    a step, and retention."""
    kill_again_and_again(tmp_path / "run", size=size, kills=8, seed=size, async_mode=async_mode)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_300_kills_leave_complete_checkpoints(size: int, async_mode: str, tmp_path: Path) -> None:
    """G1, G2, G5. Method: as above, with 300 kills."""
    kill_again_and_again(
        tmp_path / "run", size=size, kills=50, seed=100 + size, async_mode=async_mode
    )
