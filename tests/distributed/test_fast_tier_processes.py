"""The fast tier with processes of one gloo group, which pretend to be on two hosts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fast_tier import Run, State
from holdfast import CheckpointManager
from holdfast.comm import all_ranks
from processes import run_processes


def save_and_resume(rank: int, size: int, root: Path) -> list[int]:
    """Train five steps, restart, lose the disk of one host, and restart. Returns the steps that the
    starts resumed from."""
    run, resumed = Run(root, async_mode="async", local_replicas=1), []
    for steps in (5, 6, 0):
        ranks: Any = all_ranks()
        ranks.host = f"node{rank % 2}"
        state = State(rank)
        with CheckpointManager(
            root / "run", model=state.model, states={"own": state}, config=run.config, ranks=ranks
        ) as manager:
            resumed.append(int(manager.load()))
            state.check(resumed[-1])
            for step in range(resumed[-1] + 1, steps + 1):
                state.step(step)
                manager.save(step)
        # The managers of other ranks may still be deleting files of older steps.
        dist.barrier()
        if rank == 0 and steps == 6:
            shutil.rmtree(root / "disks/node1")
        dist.barrier()
    return resumed


def test_files_travel_between_processes(tmp_path: Path) -> None:
    """G18. Method: three processes on two hosts; the last start finds the disk of one of them empty
    and takes its files from the other."""
    assert run_processes(3, save_and_resume, tmp_path) == [[0, 4, 6]] * 3
    assert {path.name for path in (tmp_path / "run").glob("step-*")} == {"step-4"}
