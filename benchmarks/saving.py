"""One process saves and loads a state, beside what else can: `python -m benchmarks.saving PART`.

Each save ends when every file and folder is synced. Before each, the disk has nothing left to do;
before a warm load the page cache has all of the files, before a cold one none, and both is checked.
`raw` is what the disk gives: the same bytes written past the page cache by two threads, or read
into the same memory with nothing done to them; `raw, direct` reads past the page cache, and drops
what it reads.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.asked import Asked, asked, quiet
from benchmarks.disk import forget, let_go, recall
from benchmarks.meter import Figure, in_turns, measure
from benchmarks.peers import System, saved, stock_save_again, systems
from benchmarks.results import Section, store
from benchmarks.states import State, held_bytes, llama_like, same, small_tensors
from holdfast import CheckpointConfig, CheckpointManager

PARTS = ("saving", "loading", "cold", "small")


def saving(given: Asked, folder: Path) -> Section:
    """Into new files, in one process."""
    state = llama_like(given.nbytes)
    ways = {
        name: partial(save, system, folder / name, state)
        for name, system in systems().items()
        if not system.folder
    }
    return _section("saving", "Saving", state, in_turns(ways, given.rounds))


def save(system: System, folder: Path, state: State) -> Figure:
    """Into a new folder, in the place of its last one."""
    renew(folder)
    return measure(lambda: saved(system, folder, state))


def renew(folder: Path) -> None:
    """An empty folder, and a disk that has nothing left to do."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()


def loading(given: Asked, folder: Path) -> Section:
    """From files that the page cache has."""
    state, target, loads = _to_load(given, folder, systems())
    ways = {name: partial(_load, recall, *load, target) for name, load in loads}
    return _section("loading", "Loading, warm", state, in_turns(ways, given.rounds))


def cold(given: Asked, folder: Path) -> Section:
    """From the disk."""
    names = ("raw", "raw, direct", "holdfast", "holdfast, unchecked", "dcp", "safetensors")
    chosen = {name: system for name, system in systems().items() if name in names}
    state, target, loads = _to_load(given, folder, chosen)
    ways = {name: partial(_load, forget, *load, target) for name, load in loads}
    return _section("cold", "Loading, cold", state, in_turns(ways, given.rounds))


Load = tuple[str, tuple[Path, Callable[[Path, State], object]]]


def _to_load(
    given: Asked, folder: Path, chosen: dict[str, System]
) -> tuple[State, State, Iterator[Load]]:
    """What was saved, memory for it, and the loads: each has been tried and given the same bits."""
    state = llama_like(given.nbytes)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    loads = []
    for name, system in chosen.items():
        if system.load is None:
            continue
        place = folder / system.where
        if not system.folder:
            renew(place)
            saved(system, place, state)
        system.load(place, target)
        assert same(state, target) or name.startswith("raw"), name
        loads.append((name, (place, system.load)))
    return state, target, iter(loads)


def _load(
    ready: Callable[[Path], None],
    place: Path,
    load: Callable[[Path, State], object],
    target: State,
) -> Figure:
    ready(place)
    figure = measure(lambda: load(place, target))
    let_go(place)
    return figure


def _section(name: str, title: str, state: State, found: dict[str, list[Figure]]) -> Section:
    nbytes = held_bytes(state)
    method = f"One process, {len(state):,} tensors, {nbytes / 1e9:.2f} GB."
    return Section(name, title, method, found, {"nbytes": nbytes})


def small(given: Asked, folder: Path) -> Section:
    """Many small tensors: a first save, and one that finds the plan of the save before it."""
    state = small_tensors(min(8000, given.nbytes >> 16))
    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=0)
    compared = ("holdfast", "dcp", "torch", "safetensors", "torch_checkpointing")
    known = {name: system for name, system in systems().items() if name in compared}
    known["dcp, later"] = System("dcp, later", stock_save_again, None)
    ways: dict[str, Callable[[], Figure]] = {
        name: partial(save, system, folder / name, state) for name, system in known.items()
    }
    with CheckpointManager(folder / "steps", model=module, config=config) as manager:
        steps = iter(range(1, 1000))

        def later() -> Figure:
            os.sync()
            return measure(lambda: manager.save(next(steps)))

        ways["holdfast, later"] = later
        later()
        found = in_turns(ways, given.rounds)
    method = (
        f"One process, {len(state):,} tensors of 4 KiB. `later`: a save that finds the plan of the "
        "one before it, with DCP by its own cache of plans."
    )
    return Section("small", "Saving small tensors", method, found, {"nbytes": held_bytes(state)})


def main() -> None:
    """Measure the parts asked for, and keep what was found."""
    given = asked(__doc__, PARTS)
    quiet()
    for part in given.parts:
        with given.place() as folder:
            store(globals()[part](given, folder), given.out, add=given.add)


if __name__ == "__main__":
    main()
