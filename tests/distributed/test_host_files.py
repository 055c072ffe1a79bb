"""A sharded run whose ranks write one file together, with real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.format.names import step_name
from holdfast.storage.local import LocalStore
from processes import run_processes

WIDTH = 777
"""Width of the model: shards are uneven, and the file is large enough for `O_DIRECT`."""


def train_on(
    rank: int, size: int, folder: Path, num_steps: int, files: Any
) -> list[dict[str, torch.Tensor]]:
    """Resume, and train. Returns the contents of the model after the resume, and in each save."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    if size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = CheckpointConfig(enable=True, interval=1, files=files, async_mode="async")
    with CheckpointManager(folder, model=model, optimizers=optimizer, config=config) as manager:
        start = int(manager.load())
        found = [contents(model)]
        for step in range(start + 1, start + 1 + num_steps):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().sin()
            optimizer.step()
            manager.save(step)
            found.append(contents(model))
    return found


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def test_processes_write_one_file_and_resume_in_another_layout(tmp_path: Path) -> None:
    """G6, G20. Method: four ranks save two steps into one file each, two ranks resume and save with
    a file for each rank, then one rank resumes. Each finds what was saved, and each step is
    good."""
    first = run_processes(4, train_on, tmp_path, 2, "node")[0]
    second = run_processes(2, train_on, tmp_path, 1, "rank")[0]
    (last,) = run_processes(1, train_on, tmp_path, 0, "node")[0]
    for found, expected in ((second[0], first[-1]), (last, second[-1])):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    numbers = {1: [0], 2: [0], 3: [0, 1]}
    for step, ranks in numbers.items():
        files = sorted(path.name for path in (tmp_path / step_name(step)).glob("*.distcp"))
        assert files == [f"__{rank}_0.distcp" for rank in ranks]
        assert verify(VerifyTarget(LocalStore(tmp_path), step_name(step))).good
