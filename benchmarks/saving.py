"""One process saves and loads a state with each system: `python -m benchmarks.saving PART`.

A save ends when every file and folder is synced. Before each save, the disk is idle. Before a warm
load, the page cache has all files; before a cold load, it has none. Both are checked. `raw` is the
limit of the disk: two threads write the same bytes past the page cache, or read them into the same
memory without further work. `raw, direct` reads past the page cache and drops the bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from benchmarks.disk import cool_cache, drop_cache, warm_cache
from benchmarks.meter import Figure, measure, run_rounds
from benchmarks.options import BenchmarkOptions
from benchmarks.peers import System, save_and_sync, save_dcp_cached_plan, systems
from benchmarks.results import Section, measure_parts
from benchmarks.states import State, llama_like, local_bytes, same_bits, small_tensors
from holdfast import CheckpointConfig, CheckpointManager


def saving(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure saves into new files."""
    state = llama_like(options.nbytes)
    saves = {
        name: partial(save, system, folder / name, state)
        for name, system in systems().items()
        if not system.saved_by
    }
    return _section("saving", "Saving", state, run_rounds(saves, options.rounds))


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
    return _loads("loading", "Loading, warm", options, folder, systems().values(), warm_cache)


def cold(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure loads from the disk."""
    names = ("raw", "raw, direct", "holdfast", "holdfast, unchecked", "dcp", "safetensors")
    chosen = [system for name, system in systems().items() if name in names]
    return _loads("cold", "Loading, cold", options, folder, chosen, cool_cache)


def _loads(
    name: str,
    title: str,
    options: BenchmarkOptions,
    folder: Path,
    chosen: Iterable[System],
    prepare: Callable[[Path], None],
) -> Section:
    """Save with each system, check that its load gives the same bits, then measure the loads."""
    state = llama_like(options.nbytes)
    target = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    loads = {}
    for system in chosen:
        if system.load is None:
            continue
        saved = folder / system.folder_name
        if not system.saved_by:
            renew(saved)
            save_and_sync(system, saved, state)
        system.load(saved, target)
        assert same_bits(state, target) or system.name.startswith("raw"), system.name
        loads[system.name] = partial(_load, prepare, saved, system.load, target)
    return _section(name, title, state, run_rounds(loads, options.rounds))


def _load(
    prepare: Callable[[Path], None],
    folder: Path,
    load: Callable[[Path, State], object],
    target: State,
) -> Figure:
    prepare(folder)
    figure = measure(lambda: load(folder, target))
    drop_cache(folder)
    return figure


def _section(name: str, title: str, state: State, figures: dict[str, list[Figure]]) -> Section:
    nbytes = local_bytes(state)
    method = f"One process, {len(state):,} tensors, {nbytes / 1e9:.2f} GB."
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
