"""Ranks save and load their shards, beside what else can: `python -m benchmarks.sharded PART`.

Four processes on gloo, a thread each; tensors are cut by rows, as FSDP does. Times are from all
ranks' start to the last one's end, the sync of all files included. `raw`: every rank writes, or
reads, its bytes into a file of its own, as one process does in `benchmarks.saving`.

Resharding: what four ranks have saved by rows goes to two ranks, to one, and to four by columns;
what one process has saved goes, an eighth of each tensor, to one of eight ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.asked import Asked, asked, quiet
from benchmarks.disk import forget, let_go, recall
from benchmarks.meter import Figure, in_turns, measure, measure_together
from benchmarks.peers import System, saved, systems
from benchmarks.ranks import on_ranks
from benchmarks.results import Section, store
from benchmarks.saving import renew
from benchmarks.states import State, held_bytes, llama_like, local, mesh_of, rank, same, sharded
from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import Source
from holdfast.comm import Solo
from holdfast.loading.load import load_tree
from holdfast.state.objects import StateTree

SIZE = 4
PARTS = ("sharded_saving", "sharded_loading", "sharded_cold", "resharding")
EIGHTH = 3
"""Which of eight ranks has the eighth that is read."""

Found = dict[str, list[Figure]]


def sharded_saving(given: Asked, folder: Path) -> Section:
    """By all ranks into one checkpoint."""
    found = on_ranks(SIZE, _saves, given, folder)
    return _section("sharded_saving", f"Saving by {SIZE} ranks", given, found)


def sharded_loading(given: Asked, folder: Path) -> Section:
    """By the ranks that saved, from files that the page cache has."""
    found = on_ranks(SIZE, _loads, given, folder, recall)
    return _section("sharded_loading", f"Loading by {SIZE} ranks, warm", given, found)


def sharded_cold(given: Asked, folder: Path) -> Section:
    """By the ranks that saved, from the disk."""
    found = on_ranks(SIZE, _loads, given, folder, forget)
    return _section("sharded_cold", f"Loading by {SIZE} ranks, cold", given, found)


def resharding(given: Asked, folder: Path) -> Section:
    """By others than saved, or of a part, from files that the page cache has."""
    found: Found = on_ranks(SIZE, _save_and_load_by_columns, given, folder)
    for size in (2, 1):
        found |= on_ranks(size, _load_by_rows, given, folder)
    found |= on_ranks(1, _load_an_eighth, given, folder)
    method = (
        f"What {SIZE} ranks saved by rows, loaded by 2, by 1, and by {SIZE} by columns; and of what"
        " one process saved an eighth of the rows of each tensor. Warm."
    )
    nbytes = held_bytes(llama_like(given.nbytes, partial(torch.empty, device="meta")))
    facts = {"nbytes": nbytes}
    return Section("resharding", "Loading in another layout", method, found, facts)


def _section(name: str, title: str, given: Asked, found: Found) -> Section:
    nbytes = held_bytes(llama_like(given.nbytes, partial(torch.empty, device="meta")))
    method = f"{SIZE} processes on gloo, FSDP shards, {nbytes / 1e9:.2f} GB together."
    return Section(name, title, method, found, {"nbytes": nbytes})


def _saves(given: Asked, folder: Path) -> Found:
    state = sharded(given.nbytes, mesh_of(SIZE))
    ways = {
        name: partial(_save, system, folder / name, state)
        for name, system in systems().items()
        if system.sharded and not system.folder
    }
    return in_turns(ways, given.rounds)


def _save(system: System, folder: Path, state: State) -> Figure:
    _on_rank_0(renew, folder)
    return measure_together(lambda: saved(system, folder, state))


def _on_rank_0(work: Callable[[Path], None], folder: Path) -> None:
    if rank() == 0:
        work(folder)
    dist.barrier()


def _loads(given: Asked, folder: Path, ready: Callable[[Path], None]) -> Found:
    state = sharded(given.nbytes, mesh_of(SIZE))
    target = sharded(given.nbytes, mesh_of(SIZE), torch.zeros)
    ways = {}
    for name, system in systems().items():
        if not system.sharded or system.load is None:
            continue
        place = folder / system.where
        if not system.folder:
            _save(system, place, state)
        system.load(place, target)
        assert same(state, target) or name.startswith("raw"), name
        ways[name] = partial(_load, system.load, place, target, ready)
    return in_turns(ways, given.rounds)


def _load(
    load: Callable[[Path, State], object],
    place: Path,
    target: State,
    ready: Callable[[Path], None] = recall,
) -> Figure:
    _on_rank_0(ready, place)
    figure = measure_together(lambda: load(place, target))
    _on_rank_0(let_go, place)
    return figure


PEERS = ("holdfast", "dcp")


def _save_and_load_by_columns(given: Asked, folder: Path) -> Found:
    for name in PEERS:
        torch.manual_seed(0)
        _save(systems()[name], folder / name, sharded(given.nbytes, mesh_of(SIZE)))
    return _in_another_layout(given, folder, f"{SIZE}, rows to columns", dim=1)


def _load_by_rows(given: Asked, folder: Path) -> Found:
    return _in_another_layout(given, folder, f"{SIZE} to {dist.get_world_size()}", dim=0)


def _in_another_layout(given: Asked, folder: Path, what: str, dim: int) -> Found:
    mesh = mesh_of(dist.get_world_size())
    targets = [sharded(given.nbytes, mesh, torch.zeros, dim) for _ in PEERS]
    ways = {}
    for name, target in zip(PEERS, targets, strict=True):
        load = systems()[name].load
        assert load is not None
        ways[f"{name}, {what}"] = partial(_load, load, folder / name, target)
    found = in_turns(ways, given.rounds)
    assert same(*targets)
    return _beside(found, dist.get_world_size() * held_bytes(targets[0]))


def _beside(found: Found, nbytes: int) -> Found:
    return {n: [{**f, "needed_mb": nbytes / 1e6} for f in figures] for n, figures in found.items()}


def _load_an_eighth(given: Asked, folder: Path) -> Found:
    """One rank of eight, of which the others are imagined: each system loads as if alone."""
    whole = llama_like(given.nbytes)
    for name in PEERS:
        _save(systems()[name], folder / name, whole)
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=EIGHTH, world_size=8, store=FakeStore())
    target = sharded(given.nbytes, mesh_of(8), torch.zeros)

    def ours() -> None:
        store, name = open_for_reading(folder / "holdfast" / "step")
        source = Source(store, name, open_manifest(store, name))
        load_tree(source, StateTree(target), ranks=Solo())

    def stock() -> None:
        stock_load(dict(target), checkpoint_id=folder / "dcp", no_dist=True)

    def turn(name: str, load: Callable[[], None]) -> Figure:
        for tensor in target.values():
            local(tensor).zero_()
        recall(folder / name)
        figure = measure(load)
        parts = {n: tensor.chunk(8)[EIGHTH] for n, tensor in whole.items()}
        assert same(parts, target), name
        return figure

    loads = {"holdfast": ours, "dcp": stock}
    ways = {f"{name}, an eighth": partial(turn, name, load) for name, load in loads.items()}
    return _beside(in_turns(ways, given.rounds), held_bytes(target))


def main() -> None:
    """Measure the parts asked for, and keep what was found."""
    given = asked(__doc__, PARTS)
    quiet()
    for part in given.parts:
        with given.place() as folder:
            store(globals()[part](given, folder), given.out, add=given.add)


if __name__ == "__main__":
    main()
