"""Columns of a checkpoint that was saved by rows, loaded by four ranks: from the page cache of one
host, and from a simulated network file system. `python -m benchmarks.columns`.

`read`: each rank reads all rows. `broadcast`: one rank reads each row and sends the others their
columns. The simulated file system gives all ranks together `--mb-per-s`, and each read waits at
least 1 ms. The ranks send to each other over loopback.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

import holdfast
from benchmarks.disk import warm_cache
from benchmarks.meter import Figure, measure_ranks, run_rounds
from benchmarks.options import RESULTS
from benchmarks.ranks import run_on_ranks
from benchmarks.states import State, local_bytes, mesh_of, sharded
from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.source import Source
from holdfast.comm import Ranks, all_ranks
from holdfast.loading.load import Replicas, load_tree
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore
from holdfast.storage.store import FileReader

SIZE = 4
LATENCY_S = 0.001
MODES: tuple[Replicas, ...] = ("read", "broadcast")


class NetworkStore(LocalStore):
    """A folder whose files are read at a limited rate."""

    def __init__(self, root: Path, bytes_per_s: float) -> None:
        super().__init__(root)
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    @contextmanager
    def open(self, key: str) -> Iterator[FileReader]:
        with super().open(key) as beneath:
            yield _NetworkReader(self, beneath)

    def transfer(self, nbytes: int) -> None:
        """Wait until these bytes have arrived, after all that were requested before."""
        now = time.perf_counter()
        self._free_at = max(self._free_at, now) + nbytes / self._bytes_per_s
        time.sleep(max(LATENCY_S, self._free_at - now))


class _NetworkReader:
    def __init__(self, store: NetworkStore, beneath: FileReader) -> None:
        self._store, self._beneath = store, beneath

    def read_into(self, start: int, target: memoryview) -> int:
        self._store.transfer(len(target))
        return self._beneath.read_into(start, target)


def measure_all(folder: Path, nbytes: int, rounds: int, mb_per_s: float) -> dict[str, list[Figure]]:
    """Save by rows, and load by columns in each way. Returns the figures by file system and mode.
    Collective."""
    torch.manual_seed(0)
    mesh, ranks = mesh_of(SIZE), all_ranks()
    holdfast.save(folder / "step", dict(sharded(nbytes, mesh)))
    targets = [sharded(nbytes, mesh, torch.zeros, 1) for _ in MODES]
    stores = {
        "page cache": LocalStore(folder),
        f"network, {mb_per_s:g} MB/s": NetworkStore(folder, mb_per_s * 1e6 / SIZE),
    }
    loads = {
        f"{place} | {mode}": partial(_measured, folder, store, target, ranks, mode)
        for place, store in stores.items()
        for mode, target in zip(MODES, targets, strict=True)
    }
    figures = run_rounds(loads, rounds)
    needed = SIZE * local_bytes(targets[0])
    for of_load in figures.values():
        for figure in of_load:
            figure["needed_mb"] = needed / 1e6
    return figures


def _measured(
    folder: Path, store: LocalStore, target: State, ranks: Ranks, mode: Replicas
) -> Figure:
    if dist.get_rank() == 0:
        warm_cache(folder / "step")
    num_read = []

    def load() -> None:
        source = Source(store, "step", open_manifest(store, "step"))
        loaded = load_tree(source, StateTree(target), ranks=ranks, replicas=mode)
        num_read.append(loaded.nbytes)

    figure = measure_ranks(load)
    total = torch.tensor(num_read)
    dist.all_reduce(total)
    # Bytes of memory that others send are read from a socket, so those of the process mislead.
    return {**figure, "read_mb": int(total) / 1e6}


def lines_of(figures: dict[str, list[Figure]]) -> list[str]:
    """Lines of the table: medians, and the ratio of times within a round."""
    lines = [
        "| from | load_replicas | s | CPU s | MB read / needed | s / `read` |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in figures.items():
        place = name.partition(" | ")[0]
        ratio = median(
            figure["seconds"] / other["seconds"]
            for figure, other in zip(rounds, figures[f"{place} | read"], strict=True)
        )
        seconds, cpu_s = (median(f[key] for f in rounds) for key in ("seconds", "cpu_s"))
        share = median(figure["read_mb"] / figure["needed_mb"] for figure in rounds)
        lines.append(f"| {name} | {seconds:.2f} | {cpu_s:.2f} | {share:.2f} | {ratio:.2f} |")
    return lines


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb-per-s", type=float, default=1000.0, help="of the file system")
    parser.add_argument("--out", type=Path, default=RESULTS / "columns.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        arguments = (Path(folder), int(options.gb * 1e9), options.rounds, options.mb_per_s)
        figures = run_on_ranks(SIZE, measure_all, *arguments)
    text = "\n".join(lines_of(figures)) + "\n"
    options.out.write_text(text)
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
