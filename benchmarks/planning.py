"""Planning a save for many ranks, in one process: `python -m benchmarks.planning`.

This process is rank 0 of a job of any size; the other ranks are imagined. What they would send is
made while the clock stands still, then pickled, counted and read as it would be. The state is 2,000
float32 tensors, each sharded evenly over all ranks (FSDP), a value that all ranks share, and one of
each rank's own. Times are those of rank 0, its own share of the work included; no disk is written.

Beside it stock `torch.distributed.checkpoint` plans the same tensors, with its cache of plans. Its
times leave out what it pickles, ours do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from xxhash import xxh3_128_digest

from benchmarks.meter import machine
from holdfast.catalog.catalog import Catalog
from holdfast.comm import Sending
from holdfast.format.manifest import Table
from holdfast.format.names import METADATA, data_file
from holdfast.planning.file_layout import FileLayout
from holdfast.planning.write_plan import LocalPlan
from holdfast.saving.commit import commit
from holdfast.saving.planner import Planner
from holdfast.saving.save import begin_save
from holdfast.saving.write import WriteResult as RankResult
from holdfast.state.tree import FlatState, flatten

NUM_TENSORS = 2000
SHAPE = (16384, 4)
SIZES = (8, 64, 512, 2048, 16384)
STOCK_SIZE_MAX = 512
LATER_SAVES = 3


@dataclass(slots=True)
class Clock:
    """Seconds that rank 0 works."""

    seconds: float = 0.0

    @contextmanager
    def runs(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    @contextmanager
    def stands(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds -= time.perf_counter() - started


class Chorus:
    """The ranks of a job, of which only rank 0 is real: the others say what it says, but for the
    parts that each has of its own."""

    rank = 0

    def __init__(self, size: int, clock: Clock, own: set[str]) -> None:
        self.size = size
        self.wire_bytes = 0
        self._clock = clock
        self._own = own
        self._asked: list[list[str]] | None = None

    def gather(self, item: Any) -> list[Any]:
        with self._clock.stands():
            said = [pickle.dumps(self._said(rank, item)) for rank in range(1, self.size)]
            self.wire_bytes += sum(map(len, said))
            self._asked = None
        return [item, *map(pickle.loads, said)]

    def scatter(self, items: list[Any]) -> Any:
        self.wire_bytes += sum(len(pickle.dumps(item)) for item in items[1:])
        if isinstance(items[0], list):
            self._asked = items
        return items[0]

    def broadcast(self, item: Any) -> Any:
        self.wire_bytes += len(pickle.dumps(item)) * (self.size - 1)
        return item

    def duplicate(self) -> Chorus:
        return self

    def close(self) -> None:
        pass

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def send(self, rank: int, data: torch.Tensor) -> Sending:
        raise AssertionError(f"a save sends nothing to rank {rank}: {data.numel()} bytes")

    def receive(self, rank: int, into: torch.Tensor) -> None:
        raise AssertionError(f"a save receives nothing from rank {rank}: {into.numel()} bytes")

    def _said(self, rank: int, item: Any) -> Any:
        if isinstance(item, RankResult):
            return dataclasses.replace(item, file=data_file(rank))
        if self._asked is not None:
            return {name: self._part(rank, name) for name in self._asked[rank]}
        if isinstance(item, dict):
            own = self._own & item.keys()
            return {**item, **{name: xxh3_128_digest(self._part(rank, name)) for name in own}}
        return item

    def _part(self, rank: int, name: str) -> bytes:
        if name == "rng":
            return pickle.dumps(LocalPlan(values={f"rng.rank_{rank}": ("rng", f"rank_{rank}")}))
        # Places of items: numbers as large as any, with nothing in common.
        places = np.random.default_rng(rank).integers(1 << 30, 1 << 40, (NUM_TENSORS, 4))
        return pickle.dumps(places.astype(np.int64))


class Nowhere:
    """A `Store` that keeps sizes only."""

    url = "nowhere:"

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def list(self, _: str = "") -> list[str]:
        return []

    def size(self, key: str) -> int:
        # Every data file is as long as that of rank 0.
        return self.sizes[key] if key in self.sizes else self.sizes["data"]

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[Nowhere]:
        self.sizes[key.rpartition("/")[2]] = nbytes
        yield self

    def write(self, offset: int, parts: Sequence[bytes]) -> None:
        pass

    def free_bytes(self) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one system at one size."""

    planned_s: float
    """Of a first save, up to the first byte: what training waits for in any case."""

    first_s: float
    """All of it."""

    later_s: float
    first_wire: int
    later_wire: int
    metadata: int
    manifest: int = 0


def ours(size: int, state: FlatState, own: set[str]) -> Figures:
    """The engine's own code from `begin_save` to `commit`, less the writing."""
    clock, store = Clock(), Nowhere()
    ranks = Chorus(size, clock, own)
    planner = Planner(ranks)
    catalog: Any = Catalog(store)  # type: ignore[arg-type]
    planned, seconds, wire = [], [], []
    for _ in range(1 + LATER_SAVES):
        clock.seconds, ranks.wire_bytes = 0.0, 0
        with clock.runs():
            pending = begin_save(catalog, "step-1", state, ranks=ranks, planner=planner, step=1)
        planned.append(clock.seconds)
        with clock.runs():
            store.sizes["data"] = pending.file_layout.nbytes
            commit(
                pending.attempt,
                result_of(pending.file_layout),
                index=pending.index,
                facts=pending.facts,
                replicas=pending.replicas,
                catalog=catalog,
                ranks=ranks,
            )
        seconds.append(clock.seconds)
        wire.append(ranks.wire_bytes)
    sizes = store.sizes[METADATA], store.sizes["manifest.json"]
    later_s = statistics.median(seconds[1:])
    return Figures(planned[0], seconds[0], later_s, wire[0], wire[-1], *sizes)


def result_of(layout: FileLayout) -> RankResult:
    values = {name: (span, 7) for names, span in layout.values for name in names}
    return RankResult(layout.name, layout.nbytes, Table(layout.table_offset, 7), values)


def stock(size: int, state: dict[str, Any], folder: Path) -> Figures:
    """`create_global_plan`, and what `FileSystemWriter.finish` does with the results."""
    planner = DefaultSavePlanner(enable_plan_caching=True)
    # Plans are kept for the whole process, under the name of the planner's class.
    planner._cached_plans_key = f"{size} ranks"
    planner.set_up_planner(state, is_coordinator=True)
    local = planner.create_local_plan()
    plans = [local, *(plan_of(rank, local, size) for rank in range(1, size))]
    clock = Clock()
    with clock.runs():
        _, metadata = planner.create_global_plan(plans)
    plan_s = clock.seconds
    results = [
        [
            WriteResult(item.index, 1000, _StorageInfo(data_file(rank), 1000 * number, 1000))
            for number, item in enumerate(plan.items)
        ]
        for rank, plan in enumerate(planner.global_plan)
    ]
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    clock.seconds = 0.0
    with clock.runs():
        planner.create_global_plan([SavePlan([], usable=False)] * size)
        writer.finish(metadata, results)
    nbytes = (folder / METADATA).stat().st_size
    up = sum(len(pickle.dumps(plan)) for plan in plans[1:])
    reports = sum(len(pickle.dumps(result)) for result in results[1:])
    later = reports + nbytes * (size - 1)
    # Plans go up, and come back with their numbers; then as in every save.
    first_s = plan_s + clock.seconds
    return Figures(plan_s, first_s, clock.seconds, 2 * up + later, later, nbytes)


def plan_of(rank: int, local: SavePlan, size: int) -> SavePlan:
    """What rank 0 has planned, as another rank would have."""
    rows = SHAPE[0] // size
    start, sizes = torch.Size((rows * rank, 0)), torch.Size((rows, SHAPE[1]))

    def moved(item: WriteItem) -> WriteItem:
        assert item.tensor_data is not None
        data = dataclasses.replace(item.tensor_data, chunk=ChunkStorageMetadata(start, sizes))
        index = MetadataIndex(item.index.fqn, start)
        return dataclasses.replace(item, index=index, tensor_data=data)

    items = [moved(item) for item in local.items if item.tensor_data is not None]
    return dataclasses.replace(local, items=items)


def state_of(size: int) -> dict[str, Any]:
    """What rank 0 of so many holds; the process group is a fake one."""
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    mesh = init_device_mesh("cpu", (size,))
    part = torch.zeros(SHAPE[0] // size, SHAPE[1])
    layers = {
        str(number): {"weight": DTensor.from_local(part.clone(), mesh, [Shard(0)], run_check=False)}
        for number in range(NUM_TENSORS)
    }
    return {"layers": layers, "train_state": {"step": 7}, "rng": {"rank_0": b"seven"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--stock-size-max", type=int, default=STOCK_SIZE_MAX)
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    console = Console()
    lines = [
        "| ranks | system | first save, s | before its first byte, s | later saves, s "
        "| wire, first | wire, later | `.metadata` | manifest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in options.sizes:
        state = state_of(size)
        lines.append(row(size, "holdfast", ours(size, flatten(state), {"rng"})))
        worst = ours(size, flatten(state), {"rng", "items"})
        lines.append(row(size, "holdfast, no two files laid out alike", worst))
        if size <= options.stock_size_max:
            with TemporaryDirectory() as folder:
                lines.append(row(size, "stock DCP", stock(size, state, Path(folder))))
        dist.destroy_process_group()
        console.print(f"{size} ranks: done", highlight=False)
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if options.out:
        head = f"`python -m benchmarks.planning`: {NUM_TENSORS:,} tensors; {machine()}.\n\n"
        options.out.write_text(head + "\n".join(lines) + "\n")


def row(size: int, name: str, figures: Figures) -> str:
    sizes = [f"{n / 2**20:,.2f} MiB" for n in dataclasses.astuple(figures)[3:]]
    times = f"{figures.first_s:.3f} | {figures.planned_s:.3f} | {figures.later_s:.4f}"
    return f"| {size:,} | {name} | {times} | {' | '.join(sizes)} |"


if __name__ == "__main__":
    main()
