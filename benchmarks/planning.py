"""Planning a save for many ranks, in one process: `python -m benchmarks.planning`.

This process is rank 0 of a job of any size; the other ranks are simulated. Their messages are made
while the clock is paused, then pickled, counted and unpickled like real ones. The state is 2,000
float32 tensors, each sharded evenly over all ranks (FSDP), a value that all ranks share, and a
value of each rank. Times are CPU seconds of rank 0, including its own local work; nothing is
written.

For comparison, stock `torch.distributed.checkpoint` plans the same tensors, with its cache of
plans. The times of Holdfast include pickling, those of stock DCP exclude it.

With `--load` it plans loads: see `planned_loads`.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from benchmarks import planned_loads
from benchmarks.meter import machine
from benchmarks.simulated import (
    NUM_TENSORS,
    SHAPE,
    Done,
    SimulatedRanks,
    Stopwatch,
    state_of,
    write_result,
)
from holdfast.catalog.catalog import Catalog
from holdfast.format.names import METADATA, data_file
from holdfast.saving.commit import commit
from holdfast.saving.planner import Planner
from holdfast.saving.save import begin_save
from holdfast.state.objects import StateTree
from holdfast.state.tree import FlatState

SIZES = (8, 64, 512, 2048, 16384)
STOCK_SIZE_MAX = 512
LATER_SAVES = 3


class SizeStore:
    """`Store` that keeps only the sizes of its files."""

    url = "sizes:"

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def list(self, _: str = "") -> list[str]:
        return []

    def size(self, key: str) -> int:
        # Every rank's data file is as long as that of rank 0.
        return self.sizes[key] if key in self.sizes else self.sizes["data"]

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[SizeStore]:
        self.sizes[key.rpartition("/")[2]] = nbytes
        yield self

    def write(self, offset: int, parts: Sequence[bytes]) -> None:
        pass

    def hold(self, _: str) -> AbstractContextManager[None]:
        return nullcontext()

    def free_bytes(self) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@dataclass(frozen=True, slots=True)
class PlanningCosts:
    """Costs of one system at one number of ranks."""

    planned_s: float
    """CPU seconds of a first save before its first byte, for which training waits in any mode."""

    first_s: float
    """CPU seconds of a whole first save."""

    later_s: float
    """CPU seconds of a later save, which reuses the plan."""

    first_wire: int
    """Bytes that the ranks exchange in a first save."""

    later_wire: int
    """Bytes that the ranks exchange in a later save."""

    metadata: int
    """Bytes of `.metadata`."""

    manifest: int = 0
    """Bytes of `manifest.json` and `index.bin`."""


def measure_holdfast(size: int, state: FlatState, distinct: set[str]) -> PlanningCosts:
    """Run Holdfast's code from `begin_save` to `commit`, without writing data."""
    clock, store = Stopwatch(), SizeStore()
    ranks = SimulatedRanks(size, clock, distinct)
    planner = Planner(ranks)
    catalog: Any = Catalog(store)  # type: ignore[arg-type]
    planned, seconds, wire = [], [], []
    for _ in range(1 + LATER_SAVES):
        clock.seconds, ranks.wire_bytes = 0.0, 0
        with clock.running():
            pending = begin_save(catalog, "step-1", state, planner=planner)
        planned.append(clock.seconds)
        with clock.running():
            store.sizes["data"] = pending.file_layout.nbytes
            commit(
                pending.attempt,
                write_result(pending.file_layout),
                index=pending.index,
                facts=pending.facts,
                digests=pending.replicas.digests,
                catalog=catalog,
                ranks=ranks,
            )
        seconds.append(clock.seconds)
        wire.append(ranks.wire_bytes)
    return PlanningCosts(
        planned_s=planned[0],
        first_s=seconds[0],
        later_s=statistics.median(seconds[1:]),
        first_wire=wire[0],
        later_wire=wire[-1],
        metadata=store.sizes[METADATA],
        manifest=store.sizes["manifest.json"] + store.sizes.get("index.bin", 0),
    )


def measure_dcp(size: int, state: dict[str, Any], folder: Path) -> PlanningCosts:
    """Run stock DCP's `create_global_plan` and `FileSystemWriter.finish`."""
    planner = DefaultSavePlanner(enable_plan_caching=True)
    # DCP caches plans for the whole process, by default under the planner's class name.
    planner._cached_plans_key = f"{size} ranks"
    planner.set_up_planner(state, is_coordinator=True)
    local = planner.create_local_plan()
    plans = [local, *(local_plan_of(rank, local, size) for rank in range(1, size))]
    clock = Stopwatch()
    with clock.running():
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
    with clock.running():
        planner.create_global_plan([SavePlan([], usable=False)] * size)
        writer.finish(metadata, results)
    nbytes = (folder / METADATA).stat().st_size
    plan_bytes = sum(len(pickle.dumps(plan)) for plan in plans[1:])
    result_bytes = sum(len(pickle.dumps(result)) for result in results[1:])
    later_wire = result_bytes + nbytes * (size - 1)
    return PlanningCosts(
        planned_s=plan_s,
        first_s=plan_s + clock.seconds,
        later_s=clock.seconds,
        # A first save also gathers the local plans, and scatters the global ones.
        first_wire=2 * plan_bytes + later_wire,
        later_wire=later_wire,
        metadata=nbytes,
    )


def local_plan_of(rank: int, local: SavePlan, size: int) -> SavePlan:
    """Return the local plan of `rank`, derived from that of rank 0."""
    rows = SHAPE[0] // size
    start, sizes = torch.Size((rows * rank, 0)), torch.Size((rows, SHAPE[1]))

    def shifted(item: WriteItem) -> WriteItem:
        assert item.tensor_data is not None
        data = dataclasses.replace(item.tensor_data, chunk=ChunkStorageMetadata(start, sizes))
        index = MetadataIndex(item.index.fqn, start)
        return dataclasses.replace(item, index=index, tensor_data=data)

    items = [shifted(item) for item in local.items if item.tensor_data is not None]
    return dataclasses.replace(local, items=items)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line. Exit with status 2 if an argument is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of ranks")
    parser.add_argument("--stock-size-max", type=int, default=STOCK_SIZE_MAX)
    parser.add_argument("--load", action="store_true", help="plan loads instead of saves")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    # A load is planned by rank 0 and by another rank, and every rank has a row of each tensor.
    least = 2 if options.load else 1
    for size in options.sizes:
        if not least <= size <= SHAPE[0]:
            parser.error(f"--sizes: from {least} to {SHAPE[0]} ranks, found: {size}")
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        parser.error(f"--out: a file in an existing folder, found: {options.out}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, and print its table. `arguments`: of the command line."""
    options = parsed(arguments)
    console = Console()
    verb, plan = ("loads", planned_loads.table) if options.load else ("saves", saves)

    def done(size: int, lines: Sequence[str]) -> None:
        console.print(f"{size} ranks: done", highlight=False)
        if options.out:
            # After each size, since the next one may take many minutes, or all memory.
            head = (
                f"`python -m benchmarks.planning` plans {verb} of {NUM_TENSORS:,} tensors. "
                f"Machine: {machine()}.\n\n"
            )
            options.out.write_text(head + "\n".join(lines) + "\n")

    lines = plan(options.sizes, options.stock_size_max, done)
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def saves(sizes: Sequence[int], stock_size_max: int, done: Done) -> list[str]:
    """Lines of the table of saves. Calls `done` after each size, with the lines so far."""
    lines = [
        "| ranks | system | first save, CPU s | first save until its first byte, CPU s "
        "| later save, CPU s "
        "| sent in first save | sent in later save | size of `.metadata` "
        "| size of `manifest.json` and `index.bin` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        state = state_of(size)
        best = measure_holdfast(size, StateTree(state).flatten(), {"rng"})
        lines.append(row(size, "holdfast", best))
        worst = measure_holdfast(size, StateTree(state).flatten(), {"rng", "items"})
        lines.append(row(size, "holdfast, all file layouts differ", worst))
        if size <= stock_size_max:
            with TemporaryDirectory() as folder:
                lines.append(row(size, "stock DCP", measure_dcp(size, state, Path(folder))))
        dist.destroy_process_group()
        done(size, lines)
    return lines


def row(size: int, name: str, costs: PlanningCosts) -> str:
    sizes = [f"{n / 2**20:,.2f} MiB" for n in dataclasses.astuple(costs)[3:]]
    times = f"{costs.first_s:.3f} | {costs.planned_s:.3f} | {costs.later_s:.4f}"
    return f"| {size:,} | {name} | {times} | {' | '.join(sizes)} |"


if __name__ == "__main__":
    main()
