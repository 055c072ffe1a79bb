"""Four ranks save and load their shards with each system: `python -m benchmarks.sharded PART`.

The ranks are processes on gloo with one thread each. Tensors are sharded by rows, as FSDP does.
Times run from one barrier to the next, and include the sync of all files. `raw`: every rank writes
its bytes into its own file, or reads them from Holdfast's, as one process does in
`benchmarks.saving`, in the way that is the fastest for all ranks together.

Resharding: a checkpoint of four ranks, sharded by rows, is loaded by two ranks, by one, and by four
that shard by columns. A checkpoint of one process is loaded by one rank of eight, which reads an
eighth of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.disk import cool_cache, drop_cache, warm_cache
from benchmarks.meter import Figure, measure, measure_ranks, run_rounds
from benchmarks.options import BenchmarkOptions
from benchmarks.peers import System, save_and_sync, systems
from benchmarks.ranks import run_on_ranks
from benchmarks.results import Section, measure_parts
from benchmarks.saving import (
    measure_loads,
    noted_writes,
    renew,
    ways_to_write,
)
from benchmarks.states import (
    State,
    llama_like,
    local,
    local_bytes,
    mesh_of,
    rank,
    same_bits,
    sharded,
)
from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import Source
from holdfast.comm import Solo
from holdfast.loading.load import load_tree
from holdfast.state.objects import StateTree

SIZE = 4
EIGHTH = 3
"""Rank, of eight, that loads its eighth."""

Figures = dict[str, list[Figure]]


def sharded_saving(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure saves by all ranks into one checkpoint."""
    figures, note = run_on_ranks(SIZE, _saves, options, folder)
    return _section("sharded_saving", f"Saving by {SIZE} ranks", options, figures, note=note)


def sharded_loading(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure loads by as many ranks as saved, from the page cache."""
    figures, note = run_on_ranks(SIZE, _loads, options, folder, warm_cache)
    title = f"Loading by {SIZE} ranks, warm"
    return _section("sharded_loading", title, options, figures, note=note)


def sharded_cold(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure loads by as many ranks as saved, from the disk."""
    figures, note = run_on_ranks(SIZE, _loads, options, folder, cool_cache)
    return _section("sharded_cold", f"Loading by {SIZE} ranks, cold", options, figures, note=note)


def resharding(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure loads with other shards than saved, from the page cache."""
    figures: Figures = run_on_ranks(SIZE, _save_and_load_by_columns, options, folder)
    for size in (2, 1):
        figures |= run_on_ranks(size, _load_by_rows, options, folder)
    figures |= run_on_ranks(1, _load_an_eighth, options, folder)
    method = (
        f"A checkpoint of {SIZE} ranks, sharded by rows, loaded by 2 ranks, by 1, and by {SIZE} by "
        "columns; an eighth of the rows of each tensor in a checkpoint of one process. Warm."
    )
    return _section("resharding", "Loading in another layout", options, figures, method)


def _section(
    name: str,
    title: str,
    options: BenchmarkOptions,
    figures: Figures,
    method: str = "",
    note: str = "",
) -> Section:
    nbytes = local_bytes(llama_like(options.nbytes, partial(torch.empty, device="meta")))
    method = method or f"{SIZE} processes on gloo, FSDP shards, {nbytes / 1e9:.2f} GB together."
    if note:
        method += f" {note}"
    return Section(name, title, method, figures, {"nbytes": nbytes})


def _saves(options: BenchmarkOptions, folder: Path) -> tuple[Figures, str]:
    """Returns the figures, and a note on the ways of raw writes."""
    state = sharded(options.nbytes, mesh_of(SIZE))
    ways = ways_to_write(folder / "raw", state, partial(_on_rank_0, renew))
    saves = {
        name: partial(_save, system, folder / name, state)
        for name, system in systems(ways).items()
        if system.sharded and system.save is not None
    }
    return run_rounds(saves, options.rounds), f"Each rank: {noted_writes(ways)}"


def _save(system: System, folder: Path, state: State) -> Figure:
    _on_rank_0(renew, folder)
    return measure_ranks(lambda: save_and_sync(system, folder, state))


def _on_rank_0(work: Callable[[Path], None], folder: Path) -> None:
    if rank() == 0:
        work(folder)
    dist.barrier()


def _loads(
    options: BenchmarkOptions, folder: Path, prepare: Callable[[Path], None]
) -> tuple[Figures, str]:
    """Returns the figures, and a note on the ways of raw reads."""
    state = sharded(options.nbytes, mesh_of(SIZE))
    target = sharded(options.nbytes, mesh_of(SIZE), torch.zeros)
    chosen = {name: system for name, system in systems().items() if system.sharded}
    figures, note = measure_loads(
        chosen,
        state,
        target,
        folder,
        options.rounds,
        save=_save,
        prepare=partial(_on_rank_0, prepare),
        end=partial(_on_rank_0, drop_cache),
        meter=measure_ranks,
    )
    return figures, f"Each rank: {note}"


def _load(
    load: Callable[[Path, State], object],
    folder: Path,
    target: State,
) -> Figure:
    _on_rank_0(warm_cache, folder)
    figure = measure_ranks(lambda: load(folder, target))
    _on_rank_0(drop_cache, folder)
    return figure


RESHARDED = ("holdfast", "dcp")
"""Systems that load with other shards than saved."""


def _save_and_load_by_columns(options: BenchmarkOptions, folder: Path) -> Figures:
    for name in RESHARDED:
        torch.manual_seed(0)
        _save(systems()[name], folder / name, sharded(options.nbytes, mesh_of(SIZE)))
    return _load_resharded(options, folder, f"{SIZE}, rows to columns", dim=1)


def _load_by_rows(options: BenchmarkOptions, folder: Path) -> Figures:
    return _load_resharded(options, folder, f"{SIZE} to {dist.get_world_size()}", dim=0)


def _load_resharded(options: BenchmarkOptions, folder: Path, case: str, dim: int) -> Figures:
    mesh = mesh_of(dist.get_world_size())
    targets = [sharded(options.nbytes, mesh, torch.zeros, dim) for _ in RESHARDED]
    loads = {}
    for name, target in zip(RESHARDED, targets, strict=True):
        load = systems()[name].load
        assert load is not None
        loads[f"{name}, {case}"] = partial(_load, load, folder / name, target)
    figures = run_rounds(loads, options.rounds)
    assert same_bits(targets[0], targets[1])
    return _with_needed(figures, dist.get_world_size() * local_bytes(targets[0]))


def _with_needed(figures: Figures, nbytes: int) -> Figures:
    """Add the column `needed_mb`, the bytes that a load needs."""
    return {
        name: [{**figure, "needed_mb": nbytes / 1e6} for figure in rounds]
        for name, rounds in figures.items()
    }


def _load_an_eighth(options: BenchmarkOptions, folder: Path) -> Figures:
    """Load as one rank of eight, of which only this one exists: without collectives."""
    whole = llama_like(options.nbytes)
    for name in RESHARDED:
        _save(systems()[name], folder / name, whole)
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=EIGHTH, world_size=8, store=FakeStore())
    target = sharded(options.nbytes, mesh_of(8), torch.zeros)

    def load_holdfast() -> None:
        store, name = open_for_reading(folder / "holdfast" / "step")
        source = Source(store, name, open_manifest(store, name))
        load_tree(source, StateTree(target), ranks=Solo())

    def load_dcp() -> None:
        dcp_load(dict(target), checkpoint_id=folder / "dcp", no_dist=True)

    def run(name: str, load: Callable[[], None]) -> Figure:
        for tensor in target.values():
            local(tensor).zero_()
        warm_cache(folder / name)
        figure = measure(load)
        expected = {n: tensor.chunk(8)[EIGHTH] for n, tensor in whole.items()}
        assert same_bits(expected, target), name
        return figure

    loads = {
        "holdfast, an eighth": partial(run, "holdfast", load_holdfast),
        "dcp, an eighth": partial(run, "dcp", load_dcp),
    }
    return _with_needed(run_rounds(loads, options.rounds), local_bytes(target))


PARTS = {
    "sharded_saving": sharded_saving,
    "sharded_loading": sharded_loading,
    "sharded_cold": sharded_cold,
    "resharding": resharding,
}

if __name__ == "__main__":
    measure_parts(__doc__, PARTS)
