"""Saves of four ranks into one file each, and into one file together:
`python -m benchmarks.host_files`.

The ranks are processes on gloo with one thread each, on one host. Tensors are sharded by rows, as
FSDP does. Times run from one barrier to the next, over the whole save: plan, write, sync, commit.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from statistics import median

import torch.distributed as dist

from benchmarks.meter import Figure, machine, measure_ranks, run_rounds
from benchmarks.options import BenchmarkOptions, parse_options
from benchmarks.ranks import run_on_ranks
from benchmarks.states import State, local_bytes, mesh_of, sharded
from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, all_ranks, hosts_of
from holdfast.format.manifest import Manifest
from holdfast.saving.planner import Planner
from holdfast.saving.save import begin_save, finish_save
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore

SIZE = 4


def saves(options: BenchmarkOptions, folder: Path) -> tuple[int, dict[str, list[Figure]]]:
    """Measure both in turns. Returns the bytes of the state, and the figures of each."""
    state = sharded(options.nbytes, mesh_of(SIZE))
    ranks = all_ranks()
    hosts = hosts_of(ranks)
    runs = {
        files: partial(_save, folder / files, Planner(ranks, of), state, ranks)
        for files, of in (("rank", None), ("node", hosts))
    }
    return local_bytes(state) * SIZE, run_rounds(runs, options.rounds)


def _save(folder: Path, planner: Planner, state: State, ranks: Ranks) -> Figure:
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    dist.barrier()

    def save() -> None:
        flat = StateTree(state).flatten()
        facts = Manifest({}, {}, step=1, kind="full")
        catalog = Catalog(LocalStore(folder))
        finish_save(begin_save(catalog, "step-1", flat, planner=planner, facts=facts), ranks)

    return measure_ranks(save)


def main() -> None:
    """Print a row for each."""
    options = parse_options(__doc__, ["saves"])
    with options.temporary_folder() as folder:
        nbytes, figures = run_on_ranks(SIZE, saves, options, folder)
    print(f"{machine()}; {nbytes / 1e9:.2f} GB, {options.rounds} rounds\n")  # noqa: T201
    print("| files | seconds, median | least | most | CPU, s | CPU, s per GB |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    for files, rounds in figures.items():
        seconds = sorted(figure["seconds"] for figure in rounds)
        cpu_s = median(figure["cpu_s"] for figure in rounds)
        numbers = (median(seconds), seconds[0], seconds[-1], cpu_s, cpu_s / nbytes * 1e9)
        print(f"| {files} | {' | '.join(f'{number:.2f}' for number in numbers)} |")  # noqa: T201


if __name__ == "__main__":
    main()
