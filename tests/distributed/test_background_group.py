"""A background save and training communicate over separate process groups."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager
from processes import run_processes


def train_beside(rank: int, size: int, folder: Path, mode: Any) -> tuple[int, int]:
    """Train during a slow save. Returns the number of operations that training ran on its process
    group, and the number that the group counted."""
    model = nn.Linear(512, 1024)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    config = CheckpointConfig(
        enable=True, interval=1, async_mode=mode, write_bandwidth_limit=10.0, keep_latest_k=0
    )
    sent, group = 0, cast(Any, dist.group.WORLD)
    with CheckpointManager(folder, model=model, config=config) as manager:
        manager.save(1)
        before = group._get_sequence_number_for_group()
        published = torch.zeros(1)
        while not published.item():
            manager.wait_for_staging()
            published[0] = (folder / "step-1").exists()
            dist.all_reduce(published, dist.ReduceOp.MIN)
            sent += 1
            time.sleep(0.01)
        counted = group._get_sequence_number_for_group() - before
    return sent, counted


def test_a_background_save_does_not_use_the_process_group_of_training(tmp_path: Path) -> None:
    """G7. Method: the group of training counts its operations while two ranks write and publish a
    checkpoint. All of them are training's."""
    for mode in ("async", "async_with_pinned_mem"):
        for sent, counted in run_processes(2, train_beside, tmp_path / mode, mode):
            assert sent > 10, "nothing was sent while the step was written"
            assert counted == sent
