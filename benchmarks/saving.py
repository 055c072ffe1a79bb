"""Saving and loading one state, beside what else can: `python -m benchmarks.saving`.

One process, all systems by turns, each until its bytes are on the disk (every file and folder
synced). Holdfast checks what it writes and reads; of the others none does. Loads are warm: the page
cache has the files. `raw` is what the disk gives: the same bytes written past the page cache, or
read from it, with nothing done to them.
"""

from __future__ import annotations

import argparse
import logging
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import holdfast
from benchmarks.meter import Figure, in_turns, machine, measure, table

WINDOW_BYTES = 8 << 20

State = dict[str, torch.Tensor]


def llama_like(nbytes: int) -> State:
    """Weights, and two moments of each, with the shapes of a Llama's layers."""
    width, hidden, state, layer = 1024, 2816, {}, 0
    shapes = {
        **{f"attention.w{k}.weight": (width, width) for k in "qkvo"},
        **{f"feed_forward.w{k}.weight": (hidden, width) for k in "13"},
        "feed_forward.w2.weight": (width, hidden),
        "attention_norm.weight": (width,),
    }
    held = 0
    while held < nbytes:
        for name, shape in shapes.items():
            for part in ("layers", "exp_avg", "exp_avg_sq"):
                tensor = torch.randn(shape)
                state[f"{part}.{layer}.{name}"] = tensor
                held += tensor.nbytes
        layer += 1
    return state


def small_tensors() -> State:
    """8,000 of 4 KiB."""
    return {f"t{number}": torch.randn(1024) for number in range(8000)}


class Bench:
    """The ways to save one state, and to load it again."""

    def __init__(self, state: State, folder: Path) -> None:
        self._state, self._folder = state, folder
        self.nbytes = sum(tensor.nbytes for tensor in state.values())
        self._target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        self._window = mmap.mmap(-1, WINDOW_BYTES)
        self._window.write(os.urandom(1 << 20) * (WINDOW_BYTES >> 20))

    def saves(self) -> dict[str, Callable[[], Figure]]:
        """By name; each writes a new folder in the place of its last one."""
        ways: dict[str, Callable[[Path], object]] = {
            "raw": self._raw_write,
            "holdfast": lambda path: holdfast.save(path / "step", self._state),
            "dcp.save": lambda path: stock_save(self._state, checkpoint_id=path),
            "torch.save": lambda path: torch.save(self._state, path / "state.pt"),
            "safetensors": lambda path: safetensors.torch.save_file(
                self._state, path / "state.safetensors"
            ),
        }
        return {name: self._saving(name, way) for name, way in ways.items()}

    def loads(self) -> dict[str, Callable[[], Figure]]:
        """By name; each reads what the save of that name has left."""
        ways: dict[str, Callable[[Path], object]] = {
            "raw": self._raw_read,
            "holdfast": lambda path: holdfast.load(path / "step", self._target),
            "dcp.load": lambda path: stock_load(dict(self._target), checkpoint_id=path),
            "torch.load": lambda path: self._take(torch.load(path / "state.pt", weights_only=True)),
            "safetensors": lambda path: self._take(
                safetensors.torch.load_file(path / "state.safetensors")
            ),
        }
        stored = {"dcp.load": "dcp.save", "torch.load": "torch.save"}
        return {
            name: partial(measure, partial(way, self._folder / stored.get(name, name)))
            for name, way in ways.items()
        }

    def _saving(self, name: str, way: Callable[[Path], object]) -> Callable[[], Figure]:
        def run() -> Figure:
            path = self._folder / name
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            os.sync()
            return measure(lambda: durably(way, path))

        return run

    def _take(self, loaded: State) -> None:
        for name, tensor in loaded.items():
            self._target[name].copy_(tensor)

    def _raw_write(self, path: Path) -> None:
        file = os.open(path / "raw", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        nbytes = -(-self.nbytes // WINDOW_BYTES) * WINDOW_BYTES
        os.posix_fallocate(file, 0, nbytes)
        with ThreadPoolExecutor(2) as pool:
            offsets = range(0, nbytes, WINDOW_BYTES)
            list(pool.map(lambda at: os.pwrite(file, self._window, at), offsets))
        os.close(file)

    def _raw_read(self, path: Path) -> None:
        file, at, jobs = os.open(path / "raw", os.O_RDONLY), 0, []
        with ThreadPoolExecutor(2) as pool:
            for tensor in self._target.values():
                view = tensor.view(-1).view(torch.uint8).numpy().data
                jobs.append(pool.submit(os.preadv, file, [view], at))
                at += len(view)
        assert sum(job.result() for job in jobs) == at
        os.close(file)


def durably(way: Callable[[Path], object], folder: Path) -> None:
    """Save, and sync everything below the folder."""
    way(folder)
    for path in (*folder.rglob("*"), folder):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def main() -> None:
    """Measure, and print a table for saving and one for loading."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gb", type=float, default=2.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="8,000 tensors of 4 KiB instead")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    state = small_tensors() if asked.small else llama_like(int(asked.gb * 1e9))
    lines = [f"{machine()}; {len(state):,} tensors, {asked.rounds} rounds", ""]
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        bench = Bench(state, Path(folder))
        for title, ways in (("Saving", bench.saves()), ("Loading, warm", bench.loads())):
            found = in_turns(ways, asked.rounds)
            lines += [f"{title}, {bench.nbytes / 1e9:.2f} GB:", ""]
            lines += [*table(found, bench.nbytes, "raw", "holdfast"), ""]
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)
    if asked.out:
        asked.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
