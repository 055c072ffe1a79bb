"""Rank 0 of a job of any size, whose other ranks are simulated.

The state is 2,000 float32 tensors, each sharded evenly over all ranks (FSDP), a value that all
ranks share, and a value of each rank.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from xxhash import xxh3_128_digest

from holdfast.comm import Solo
from holdfast.format.manifest import Table
from holdfast.format.names import data_file
from holdfast.planning.file_layout import FileLayout
from holdfast.planning.write_plan import LocalPlan
from holdfast.saving.write import WriteResult

Done = Callable[[int, Sequence[str]], None]
"""Called after each number of ranks, with the lines of the table so far."""

NUM_TENSORS = 2000
SHAPE = (16384, 4)


@dataclass(slots=True)
class Stopwatch:
    """CPU seconds that rank 0 works."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds += time.process_time() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds -= time.process_time() - started


class SimulatedRanks(Solo):
    """Communicator of rank 0 in which the other ranks are simulated.

    They send what rank 0 sends, except for the names in `distinct`, which differ on each rank.
    """

    def __init__(self, size: int, clock: Stopwatch, distinct: set[str]) -> None:
        self.size = size
        self.wire_bytes = 0
        self._clock = clock
        self._distinct = distinct
        self._requested: list[list[str]] | None = None

    def gather(self, item: Any) -> list[Any]:
        with self._clock.paused():
            messages = [pickle.dumps(self._message(rank, item)) for rank in range(1, self.size)]
            self.wire_bytes += sum(map(len, messages))
            self._requested = None
        return [item, *map(pickle.loads, messages)]

    def scatter(self, items: list[Any]) -> Any:
        self.wire_bytes += sum(len(pickle.dumps(item)) for item in items[1:])
        if isinstance(items[0], list):
            self._requested = items
        return items[0]

    def broadcast(self, item: Any) -> Any:
        self.wire_bytes += len(pickle.dumps(item)) * (self.size - 1)
        return item

    def _message(self, rank: int, item: Any) -> Any:
        """Return what `rank` sends where rank 0 sends `item`."""
        if isinstance(item, tuple) and isinstance(item[0], WriteResult):
            return dataclasses.replace(item[0], file=data_file(rank)), *item[1:]
        if self._requested is not None:
            return {name: self._plan(rank, name) for name in self._requested[rank]}
        if isinstance(item, dict):
            names = self._distinct & item.keys()
            return {**item, **{name: xxh3_128_digest(self._plan(rank, name)) for name in names}}
        return item

    def _plan(self, rank: int, name: str) -> bytes:
        """Return a rank's pickled local plan of a component, or offsets of its items."""
        if name == "rng":
            return pickle.dumps(LocalPlan(values={f"rng.rank_{rank}": ("rng", f"rank_{rank}")}))
        # Large offsets that no two ranks share, so that they neither compress nor deduplicate.
        offsets = np.random.default_rng(rank).integers(1 << 30, 1 << 40, (NUM_TENSORS, 4))
        return pickle.dumps(offsets.astype(np.int64))


def write_result(layout: FileLayout) -> WriteResult:
    """Return what rank 0 reports once its file is written."""
    values = {name: (span, 7) for names, span in layout.values for name in names}
    return WriteResult(layout.name, layout.nbytes, Table(layout.table_offset, 7), values)


def state_of(size: int, rank: int = 0) -> dict[str, Any]:
    """Return the state of one of `size` ranks, in a fake process group."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    mesh = init_device_mesh("cpu", (size,))
    rows = torch.zeros(SHAPE[0] // size, SHAPE[1])
    layers = {
        str(number): {"weight": DTensor.from_local(rows.clone(), mesh, [Shard(0)], run_check=False)}
        for number in range(NUM_TENSORS)
    }
    return {"layers": layers, "train_state": {"step": 7}, "rng": {"rank_0": b"seven"}}
