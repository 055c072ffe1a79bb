"""Holdfast and what else saves and loads a state, each with the settings that its documents call
the fast ones, and all synced. Holdfast checks what it writes and reads; of the others none does.

`torch_checkpointing` writes with its direct mode off: ext4 refuses that mode's unaligned writes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import holdfast
from benchmarks.disk import random_window, raw_read, raw_read_direct, raw_write, sync
from benchmarks.states import State, held_bytes, local, rank
from holdfast.catalog.source import Source
from holdfast.format import checksum


@dataclass(frozen=True, slots=True)
class System:
    """One way to save and load."""

    name: str
    save: Callable[[Path, State], object]
    """Into an empty folder; `saved` syncs it."""

    load: Callable[[Path, State], object] | None
    """Into the memory of a state, from what `save` has left in the folder; None: as another's."""

    sharded: bool = True
    """Whether many ranks can do it together."""

    folder: str = ""
    """Whose save it loads, where that is not its own."""

    @property
    def where(self) -> str:
        """Name of its folder."""
        return self.folder or self.name


def systems() -> dict[str, System]:
    """Those that can be had here, by name; `raw` is what the disk and the memory give."""
    found = [
        System("raw", _raw_save, _raw_load),
        System("raw, direct", _raw_save, _raw_load_direct, folder="raw"),
        System("holdfast", _ours_save, _ours_load),
        System("holdfast, unchecked", _unchecked(_ours_save), _unchecked(_ours_load)),
        System("dcp", _stock_save(1), _stock_load),
        System("dcp, 2 threads", _stock_save(2), None),
        System("torch", _torch_save, _torch_load, sharded=False),
        System("safetensors", _safetensors_save, _safetensors_load, sharded=False),
    ]
    if importlib.util.find_spec("torch_checkpointing") is not None:
        found.append(System("torch_checkpointing", _meta_save, _meta_load))
    return {system.name: system for system in found}


def saved(system: System, folder: Path, state: State) -> None:
    """Save by it, until every byte is on the disk. Collective: every rank calls this."""
    system.save(folder, state)
    if dist.is_initialized():
        dist.barrier()
    if rank() == 0:
        sync(folder)


def _raw_save(folder: Path, state: State) -> None:
    threads = 1 if dist.is_initialized() else 2
    raw_write(folder / f"raw-{rank()}", held_bytes(state), _window(), threads)


def _raw_load(folder: Path, state: State) -> None:
    views = [local(t).view(-1).view(torch.uint8).numpy().data for t in state.values()]
    raw_read(folder / f"raw-{rank()}", views, 1 if dist.is_initialized() else 2)


def _raw_load_direct(folder: Path, state: State) -> None:
    threads = 1 if dist.is_initialized() else 2
    raw_read_direct(folder / f"raw-{rank()}", held_bytes(state), threads)


_window = cache(random_window)


def _ours_save(folder: Path, state: State) -> None:
    holdfast.save(folder / "step", state)


def _ours_load(folder: Path, state: State) -> None:
    holdfast.load(folder / "step", state)


def _unchecked(work: Callable[[Path, State], None]) -> Callable[[Path, State], None]:
    def run(folder: Path, state: State) -> None:
        with unchecked():
            work(folder, state)

    return run


@contextmanager
def unchecked() -> Iterator[None]:
    """Holdfast without a checksum of any block of a tensor: a save takes none, and a load reads as
    it does what has none."""
    real = checksum.block_checksums, Source.checksums

    def none_taken(data: memoryview, block_bytes: int = checksum.BLOCK_BYTES) -> list[int]:
        return [0] * checksum.num_blocks(len(data), block_bytes)

    try:
        checksum.block_checksums = none_taken
        Source.checksums = lambda *_: None  # type: ignore[method-assign]
        yield
    finally:
        checksum.block_checksums, Source.checksums = real  # type: ignore[method-assign]


def _stock_save(threads: int) -> Callable[[Path, State], None]:
    def save(folder: Path, state: State) -> None:
        writer = FileSystemWriter(folder, sync_files=True, thread_count=threads)
        stock_save(dict(state), storage_writer=writer)

    return save


def stock_save_again(folder: Path, state: State) -> None:
    """`dcp.save` with the plan of the save before it, where there was one."""
    planner = DefaultSavePlanner(enable_plan_caching=True)
    stock_save(dict(state), storage_writer=FileSystemWriter(folder), planner=planner)


def _stock_load(folder: Path, state: State) -> None:
    stock_load(dict(state), checkpoint_id=folder)


def _torch_save(folder: Path, state: State) -> None:
    torch.save(dict(state), folder / "state.pt")


def _torch_load(folder: Path, state: State) -> None:
    _take(state, torch.load(folder / "state.pt", weights_only=True, mmap=True))


def _safetensors_save(folder: Path, state: State) -> None:
    safetensors.torch.save_file(dict(state), folder / "state.safetensors")


def _safetensors_load(folder: Path, state: State) -> None:
    _take(state, safetensors.torch.load_file(folder / "state.safetensors"))


def _take(state: State, loaded: State) -> None:
    for name, tensor in loaded.items():
        state[name].copy_(tensor)


def _meta_save(folder: Path, state: State) -> None:
    _meta_manager().save(os.fspath(folder / "step"), {"state": dict(state)})


def _meta_load(folder: Path, state: State) -> None:
    _meta_manager().load(os.fspath(folder / "step"), into={"state": dict(state)})


def meta_config(config: Any) -> Any:
    """Of `torch_checkpointing`, for this disk."""
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return config


@cache
def _meta_manager() -> Any:
    from torch_checkpointing import CheckpointManager

    return meta_config(CheckpointManager.Config.with_sync_save()).build()
