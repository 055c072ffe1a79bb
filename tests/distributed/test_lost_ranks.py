"""Ranks that hang, come late or never, as processes of one gloo group."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager, comm
from processes import run_processes

TIMEOUT_S = 5


def outcome_of_a_save(rank: int, size: int, folder: Path, hung: str) -> Any:
    """Make a group with a short time-out. Rank 1 hangs before it makes its manager, or in a save;
    the others return their error, and the seconds that they waited."""
    store = dist.distributed_c10d.PrefixStore("again", dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    comm._REPORT_S = 1.0
    dist.barrier()
    # From here on the ranks meet in no collective of the test, since the group will be broken.
    dist.barrier = lambda *_, **__: None
    started = time.monotonic()
    error = None
    try:
        if rank == 1 and hung == "start":
            store.wait(["done"])
            return None
        config = CheckpointConfig(enable=True, interval=1)
        manager = CheckpointManager(folder, model=nn.Linear(3, 3), config=config)
        if rank == 1:
            store.wait(["done"])
            return None
        manager.save(1)
    except holdfast.RankError as lost:
        error = str(lost)
    waited_s = time.monotonic() - started
    if store.add("finished", 1) == size - 1:
        store.set("done", "")
    return error, waited_s


@pytest.mark.parametrize(
    ("hung", "stage"),
    [("start", "while all of them connect"), ("save", "at the start of `save`")],
)
def test_a_hung_rank_is_named_after_the_time_out_of_the_callers_group(
    hung: str, stage: str, tmp_path: Path
) -> None:
    """G17. Method: rank 1 of three hangs before it starts, or in a save. The group of the caller
    has a time-out of five seconds; torch's own is half an hour."""
    found = run_processes(3, outcome_of_a_save, tmp_path, hung)
    for rank in (0, 2):
        said, waited_s = found[rank]
        assert f"rank {rank} of 3 lost another rank" in said
        assert stage in said
        assert "no sign of rank 1:" in said
        assert waited_s < TIMEOUT_S + 10
