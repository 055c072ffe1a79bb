"""Planning a load for many ranks, in one process: `python -m benchmarks.planning --load`.

A checkpoint of 2,000 tensors is saved for a job of any size: both indices are real, the data files
are sparse. Rank 0 opens it and plans its reads, then another rank unpickles the messages of rank 0
and plans its own. The other ranks are simulated. No tensor is read. Times are CPU seconds.

For comparison, stock `torch.distributed.checkpoint` plans the same load: every rank reads
`.metadata`.
"""

from __future__ import annotations

import os
import pickle
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from benchmarks.simulated import Done, SimulatedRanks, Stopwatch, state_of, write_result
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.open_any import Opened, open_in
from holdfast.catalog.source import Source
from holdfast.comm import Ranks, Solo, run_on_rank_0
from holdfast.errors import HoldfastError
from holdfast.format.names import ROWS, data_file
from holdfast.loading.load import load_tree
from holdfast.loading.read import Wanted, plan_reads
from holdfast.planning.gc_pause import gc_paused
from holdfast.saving.commit import commit
from holdfast.saving.planner import Planner
from holdfast.saving.save import begin_save
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore

T = TypeVar("T")

NAME = "step-1"
HEAD = (
    "| ranks | system | rank 0, CPU s | another rank, CPU s | memory of that rank "
    "| sent to each rank | of the index read by a rank |\n|---|---|---|---|---|---|---|"
)


class CountingStore(LocalStore):
    """A folder that counts the bytes of `index.bin` that are read."""

    num_read = 0

    def read(self, key: str, start: int, stop: int) -> bytes:
        data = super().read(key, start, stop)
        self.num_read += len(data) if key.endswith(ROWS) else 0
        return data


class RecordingRanks(Solo):
    """Communicator of rank 0. The other ranks are simulated, and send what rank 0 sends."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: list[bytes] = []
        """Messages to rank 1."""

    def gather(self, item: T) -> list[T]:
        message = pickle.dumps(item)
        from_others = [pickle.loads(message) for _ in range(1, self.size)]
        return [item, *from_others]

    def scatter(self, items: list[T]) -> T:
        self.sent.append(pickle.dumps(items[1]))
        return items[0]

    def broadcast(self, item: T) -> T:
        self.sent.append(pickle.dumps(item))
        return item


class ReplayedRanks(Solo):
    """Communicator of rank 1, which gets the messages that rank 0 has sent before."""

    rank = 1

    def __init__(self, size: int, messages: Sequence[bytes]) -> None:
        self.size = size
        self._messages = iter(messages)

    def gather(self, item: T) -> list[T]:
        if isinstance(item, HoldfastError):
            raise item
        pickle.dumps(item)
        return []

    def scatter(self, _: list[T]) -> T:
        received: T = self._received()
        return received

    def broadcast(self, _: T) -> T:
        received: T = self._received()
        return received

    def _received(self) -> Any:
        return pickle.loads(next(self._messages))


@dataclass(frozen=True, slots=True)
class LoadCosts:
    """Costs of planning one load."""

    first_s: float
    """CPU seconds of rank 0."""

    other_s: float
    """CPU seconds of another rank."""

    memory: int
    """Peak of the memory that the other rank allocates."""

    sent: int
    """Bytes that rank 0 sends to each rank."""

    num_read: int
    """Bytes of the index that the other rank reads."""


def table(sizes: Sequence[int], stock_size_max: int, done: Done) -> list[str]:
    """Lines of the table, then a summary of the largest number of ranks up to 2,048. Calls `done`
    after each size, with the lines so far."""
    lines, summary = [HEAD], ""
    for size in sizes:
        with TemporaryDirectory() as folder:
            save_for(size, Path(folder))
            costs = measure_holdfast(size, Path(folder))
            lines.append(_row(size, "holdfast", costs))
            if size <= 2048:
                summary = _summary(size, costs)
            if size <= stock_size_max:
                lines.append(_row(size, "stock DCP", measure_dcp(size, Path(folder))))
        done(size, [*lines, summary])
    return [*lines, summary]


def _row(size: int, name: str, costs: LoadCosts) -> str:
    sizes = [f"{n / 2**20:,.2f} MiB" for n in (costs.memory, costs.sent, costs.num_read)]
    return (
        f"| {size:,} | {name} | {costs.first_s:.3f} | {costs.other_s:.3f} | {' | '.join(sizes)} |"
    )


def _summary(size: int, costs: LoadCosts) -> str:
    return (
        f"load {size}: rank 0 {costs.first_s:.2f} s, a rank {costs.other_s:.2f} s, to each rank "
        f"{costs.sent / 2**20:.2f} MiB"
    )


def save_for(size: int, folder: Path) -> None:
    """Save a checkpoint of `size` ranks, with sparse data files."""
    state = state_of(size)
    ranks = SimulatedRanks(size, Stopwatch(), {"rng"})
    catalog = Catalog(LocalStore(folder))
    pending = begin_save(catalog, NAME, StateTree(state).flatten(), planner=Planner(ranks))
    nbytes = pending.file_layout.nbytes
    for rank in range(size):
        file = folder / str(pending.attempt) / data_file(rank)
        file.touch()
        os.truncate(file, nbytes)
    commit(
        pending.attempt,
        write_result(pending.file_layout),
        index=pending.index,
        facts=pending.facts,
        digests=pending.replicas.digests,
        catalog=catalog,
        ranks=ranks,
    )
    dist.destroy_process_group()


def measure_holdfast(size: int, folder: Path) -> LoadCosts:
    """Run Holdfast's code from opening the checkpoint to the plan of all reads."""
    store = CountingStore(folder)
    tree = _tree(size, 0)
    ranks = RecordingRanks(size)
    started = time.process_time()
    with gc_paused():
        opened = run_on_rank_0(ranks, lambda: open_in(store, NAME))
    _plan(opened, store, tree, ranks)
    first_s = time.process_time() - started
    del opened
    tree = _tree(size, 1)
    store.num_read = 0
    started = time.process_time()
    _load_on_another(size, ranks.sent, store, tree)
    other_s = time.process_time() - started
    num_read = store.num_read
    tracemalloc.start()
    _load_on_another(size, ranks.sent, store, tree)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return LoadCosts(first_s, other_s, memory, sum(map(len, ranks.sent)), num_read)


def _tree(size: int, rank: int) -> StateTree:
    """The tensors of one rank. The values are left out: their bytes do not exist."""
    state = state_of(size, rank)
    dist.destroy_process_group()
    return StateTree({"layers": state["layers"]})


def _load_on_another(
    size: int, messages: Sequence[bytes], store: LocalStore, tree: StateTree
) -> None:
    ranks = ReplayedRanks(size, messages)
    with gc_paused():
        opened = ranks.broadcast(cast("Opened", None))
    _plan(opened, store, tree, ranks)


def _plan(opened: Opened, store: LocalStore, tree: StateTree, ranks: Ranks) -> None:
    def plan(source: Source, wanted: Sequence[Wanted]) -> int:
        plan_reads(source, wanted)
        return 0

    load_tree(opened.source(store), tree, ranks=ranks, fill=plan)


def measure_dcp(size: int, folder: Path) -> LoadCosts:
    """Run stock DCP's planning of the same load. Every rank reads `.metadata`."""
    (folder / NAME / "manifest.json").rename(folder / "manifest.json")
    seconds = []
    for rank in (0, 1):
        state = state_of(size, rank)
        layers = {f"layers.{n}.weight": layer["weight"] for n, layer in state["layers"].items()}
        dist.destroy_process_group()
        started = time.process_time()
        planner = DefaultLoadPlanner()
        metadata = FileSystemReader(folder / NAME).read_metadata()
        planner.set_up_planner(layers, metadata, is_coordinator=not rank)
        local = planner.create_local_plan()
        message = pickle.dumps(local)
        if not rank:
            planner.create_global_plan([pickle.loads(message) for _ in range(size)])
        seconds.append(time.process_time() - started)
    tracemalloc.start()
    FileSystemReader(folder / NAME).read_metadata()
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    nbytes = (folder / NAME / ".metadata").stat().st_size
    return LoadCosts(seconds[0], seconds[1], memory, len(message), nbytes)
