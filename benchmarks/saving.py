"""One process saves and loads a state with each system: `python -m benchmarks.saving PART`.

A save ends when every file and folder is synced. Before each save, the disk is idle. Before a warm
load, the page cache has all files; before a cold load, it has none. Both are checked. `raw` is the
limit of the disk: threads write as many bytes past the page cache, or read them from Holdfast's
file into the same memory without further work. `raw` writes one buffer of 32 MiB again and again,
which stays in the CPU cache; `raw, from memory` writes the state itself. `raw, direct` reads past
the page cache and drops the bytes. Before the rounds, each chooses the fastest number of threads
and bytes of a call: see `benchmarks.raw`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.disk import cool_cache, drop_cache, warm_cache
from benchmarks.meter import Figure, measure, round_order, run_rounds
from benchmarks.options import BenchmarkOptions
from benchmarks.peers import (
    System,
    raw_load,
    raw_load_direct,
    raw_save,
    raw_save_memory,
    save_and_sync,
    save_dcp_cached_plan,
    systems,
)
from benchmarks.raw import Ways, fastest
from benchmarks.results import Section, measure_parts
from benchmarks.states import State, llama_like, local_bytes, same_bits, small_tensors
from holdfast import CheckpointConfig, CheckpointManager


def saving(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure saves into new files."""
    state = llama_like(options.nbytes)
    ways = ways_to_write(folder / "raw", state, renew)
    saves = {
        name: partial(save, system, folder / name, state)
        for name, system in systems(ways).items()
        if system.save is not None
    }
    figures = run_rounds(saves, options.rounds)
    return _section("saving", "Saving", state, figures, noted_writes(ways))


def ways_to_write(folder: Path, state: State, prepare: Callable[[Path], None]) -> Ways:
    """Return the fastest ways of raw writes of this rank's shards. Collective.

    `prepare(folder)` runs on each rank before each write.
    """
    before = partial(prepare, folder)
    return Ways(
        write=fastest(partial(raw_save, folder, state), before),
        write_memory=fastest(partial(raw_save_memory, folder, state), before),
    )


def noted_writes(ways: Ways) -> str:
    """Describe the ways of raw writes, for the method of a section."""
    return f"`raw`: {ways.write}. `raw, from memory`: {ways.write_memory}."


def save(system: System, folder: Path, state: State) -> Figure:
    """Measure a save into a new folder, which replaces the one of the round before."""
    renew(folder)
    return measure(lambda: save_and_sync(system, folder, state))


def renew(folder: Path) -> None:
    """Replace `folder` by an empty one, and wait until the disk is idle."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()


def loading(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure loads from the page cache."""
    return _loads("loading", "Loading, warm", options, folder, [*systems()], warm_cache)


def cold(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure loads from the disk."""
    names = ("raw", "raw, direct", "holdfast", "holdfast, unchecked", "dcp", "safetensors")
    return _loads("cold", "Loading, cold", options, folder, names, cool_cache)


def _loads(
    name: str,
    title: str,
    options: BenchmarkOptions,
    folder: Path,
    names: Iterable[str],
    prepare: Callable[[Path], None],
) -> Section:
    """Measure the loads of these systems."""
    state = llama_like(options.nbytes)
    target = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    chosen = {name: system for name, system in systems().items() if name in names}
    figures, note = measure_loads(
        chosen,
        state,
        target,
        folder,
        options.rounds,
        save=save,
        prepare=prepare,
        end=drop_cache,
        meter=measure,
    )
    return _section(name, title, state, figures, note)


def measure_loads(
    chosen: Mapping[str, System],
    state: State,
    target: State,
    folder: Path,
    rounds: int,
    *,
    save: Callable[[System, Path, State], object],
    prepare: Callable[[Path], None],
    end: Callable[[Path], None],
    meter: Callable[[Callable[[], object]], Figure],
) -> tuple[dict[str, list[Figure]], str]:
    """Save with each system, check that its load gives the same bits, then measure the loads, in
    changing order, after a round that is not counted. Returns the figures, and a note on the ways
    of raw reads. Collective.

    Loads from one folder run one after the other: how fast pages of the page cache are depends on
    where in memory they are, which changes when they are read again from the disk. So loads are
    compared on the same pages.

    `save(system, folder, state)` saves into a new folder. `prepare(folder)` runs before each load,
    `end(folder)` after the loads from a folder.
    """
    for name, system in chosen.items():
        if system.load is not None and not system.reads:
            save(system, folder / name, state)
    ways = ways_to_read(folder / "holdfast", target, prepare)
    loads: dict[Path, dict[str, Callable[[], object]]] = {}
    for name, system in systems(ways).items():
        if name in chosen and system.load is not None:
            saved = folder / system.folder_name
            system.load(saved, target)
            assert same_bits(state, target) or name.startswith("raw"), name
            loads.setdefault(saved, {})[name] = partial(system.load, saved, target)
    figures: dict[str, list[Figure]] = {name: [] for group in loads.values() for name in group}
    for number in range(rounds + 1):
        for saved in round_order([*loads], number):
            for name in round_order([*loads[saved]], number):
                prepare(saved)
                figure = meter(loads[saved][name])
                if number:
                    figures[name].append(figure)
            end(saved)
    return figures, f"`raw`: {ways.read}. `raw, direct`: {ways.read_direct}."


def ways_to_read(folder: Path, target: State, prepare: Callable[[Path], None]) -> Ways:
    """Return the fastest ways of raw reads of Holdfast's save in `folder` into `target`, which is
    on this rank. Collective.

    `prepare(folder)` runs on each rank before each read.
    """
    before = partial(prepare, folder)
    return Ways(
        read=fastest(partial(raw_load, folder, target), before),
        read_direct=fastest(partial(raw_load_direct, folder, target), before),
    )


def _section(
    name: str, title: str, state: State, figures: dict[str, list[Figure]], note: str
) -> Section:
    nbytes = local_bytes(state)
    method = f"One process, {len(state):,} tensors, {nbytes / 1e9:.2f} GB. {note}"
    return Section(name, title, method, figures, {"nbytes": nbytes})


def small(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure saves of many small tensors: a first save, and one with a cached plan."""
    state = small_tensors(min(8000, options.nbytes >> 16))
    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=0)
    names = ("holdfast", "dcp", "torch", "safetensors", "torch_checkpointing")
    chosen = {name: system for name, system in systems().items() if name in names}
    chosen["dcp, later"] = System("dcp, later", save_dcp_cached_plan, None)
    saves: dict[str, Callable[[], Figure]] = {
        name: partial(save, system, folder / name, state) for name, system in chosen.items()
    }
    with CheckpointManager(folder / "steps", model=module, config=config) as manager:
        steps = iter(range(1, 1000))

        def save_later() -> Figure:
            os.sync()
            return measure(lambda: manager.save(next(steps)))

        saves["holdfast, later"] = save_later
        save_later()
        figures = run_rounds(saves, options.rounds)
    method = (
        f"One process, {len(state):,} tensors of 4 KiB. `later`: a save that reuses the plan of "
        "the previous save (DCP: by its cache of plans)."
    )
    nbytes = local_bytes(state)
    return Section("small", "Saving small tensors", method, figures, {"nbytes": nbytes})


PARTS = {
    "saving": saving,
    "loading": loading,
    "cold": cold,
    "small": small,
}

if __name__ == "__main__":
    measure_parts(__doc__, PARTS)
