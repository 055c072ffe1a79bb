"""Systems that save and load a state, each with the fast settings in its documentation.

Every save is synced. Holdfast computes checksums when it writes and verifies them when it reads;
the other systems do not. The direct mode of `torch_checkpointing` is off, since its writes are not
aligned, and ext4 refuses those.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import holdfast
import holdfast.dcp
from benchmarks.disk import sync
from benchmarks.raw import Way, Ways, raw_read, raw_read_direct, raw_write, raw_write_memory
from benchmarks.states import State, local, local_bytes, rank
from holdfast.catalog.source import Source
from holdfast.format import checksum


@dataclass(frozen=True, slots=True)
class System:
    """One way to save and load."""

    name: str
    save: Callable[[Path, State], object] | None
    """Save into an empty folder; `save_and_sync` syncs it. None: not measured."""

    load: Callable[[Path, State], object] | None
    """Load from that folder into the tensors of a state; None: not measured."""

    sharded: bool = True
    """Whether several ranks can save and load together."""

    reads: str = ""
    """Name of the system whose save this one loads; empty: its own."""

    @property
    def folder_name(self) -> str:
        """Name of the folder to load from."""
        return self.reads or self.name


def systems(ways: Ways | None = None) -> dict[str, System]:
    """Return the installed systems by name; `raw` is the limit of disk and memory, in these ways.
    It reads Holdfast's files."""
    ways = ways or Ways()
    raw_read_past_cache = partial(raw_load_direct, way=ways.read_direct)
    installed = [
        System(
            "raw",
            partial(raw_save, way=ways.write),
            partial(raw_load, way=ways.read),
            reads="holdfast",
        ),
        System("raw, direct", None, raw_read_past_cache, reads="holdfast"),
        System("raw, from memory", partial(raw_save_memory, way=ways.write_memory), None),
        System("holdfast", _holdfast_save, _holdfast_load),
        System(
            "holdfast, unchecked",
            _unchecked(_holdfast_save),
            _unchecked(_holdfast_load),
            reads="holdfast",
        ),
        System("dcp", _dcp_save(1), _dcp_load),
        System("dcp, 2 threads", _dcp_save(2), None),
        System("dcp, holdfast", _dcp_save_holdfast, _dcp_load_holdfast),
        System("torch", _torch_save, _torch_load, sharded=False),
        System("safetensors", _safetensors_save, _safetensors_load, sharded=False),
    ]
    if importlib.util.find_spec("torch_checkpointing") is not None:
        installed.append(System("torch_checkpointing", _meta_save, _meta_load))
    return {system.name: system for system in installed}


def save_and_sync(system: System, folder: Path, state: State) -> None:
    """Save, and return once every byte is on the disk. Collective."""
    assert system.save is not None, system.name
    system.save(folder, state)
    if dist.is_initialized():
        dist.barrier()
    if rank() == 0:
        sync(folder)


def raw_save(folder: Path, state: State, way: Way) -> None:
    """Write as many bytes as the state has on this rank, into a file of its own."""
    raw_write(folder / f"raw-{rank()}", local_bytes(state), way)


def raw_save_memory(folder: Path, state: State, way: Way) -> None:
    """Write the pages that hold this rank's shards, from where they are in memory."""
    raw_write_memory(folder / f"raw-{rank()}", _views(state), way)


def raw_load(folder: Path, state: State, way: Way) -> None:
    """Read the first bytes of this rank's file into the tensors."""
    raw_read(_data_file(folder), _views(state), way)


def raw_load_direct(folder: Path, state: State, way: Way) -> None:
    """Read as many bytes past the page cache, and drop them."""
    raw_read_direct(_data_file(folder), local_bytes(state), way)


def _data_file(folder: Path) -> Path:
    """Return the file that Holdfast wrote on this rank."""
    return folder / "step" / f"__{rank()}_0.distcp"


def _views(state: State) -> list[memoryview]:
    """Return the bytes of this rank's shards."""
    return [local(t).view(-1).view(torch.uint8).numpy().data for t in state.values()]


def _holdfast_save(folder: Path, state: State) -> None:
    holdfast.save(folder / "step", state)


def _holdfast_load(folder: Path, state: State) -> None:
    holdfast.load(folder / "step", state)


def _unchecked(work: Callable[[Path, State], None]) -> Callable[[Path, State], None]:
    def run(folder: Path, state: State) -> None:
        with unchecked():
            work(folder, state)

    return run


@contextmanager
def unchecked() -> Iterator[None]:
    """Context in which Holdfast computes and verifies no checksums of tensor blocks."""
    originals = checksum.block_checksums, Source.checksums

    def zeros(data: memoryview, block_bytes: int = checksum.BLOCK_BYTES) -> list[int]:
        return [0] * checksum.num_blocks(len(data), block_bytes)

    try:
        checksum.block_checksums = zeros
        Source.checksums = lambda *_: None  # type: ignore[method-assign]
        yield
    finally:
        checksum.block_checksums, Source.checksums = originals  # type: ignore[method-assign]


def _dcp_save(threads: int) -> Callable[[Path, State], None]:
    def save(folder: Path, state: State) -> None:
        writer = FileSystemWriter(folder, sync_files=True, thread_count=threads)
        dcp_save(dict(state), storage_writer=writer)

    return save


def save_dcp_cached_plan(folder: Path, state: State) -> None:
    """Save with DCP, which caches the plan of its first save and reuses it."""
    planner = DefaultSavePlanner(enable_plan_caching=True)
    dcp_save(dict(state), storage_writer=FileSystemWriter(folder), planner=planner)


def _dcp_load(folder: Path, state: State) -> None:
    dcp_load(dict(state), checkpoint_id=folder)


def _dcp_save_holdfast(folder: Path, state: State) -> object:
    return dcp_save(state, storage_writer=holdfast.dcp.Writer(folder))


def _dcp_load_holdfast(folder: Path, state: State) -> object:
    return dcp_load(state, storage_reader=holdfast.dcp.Reader(folder))


def _torch_save(folder: Path, state: State) -> None:
    torch.save(dict(state), folder / "state.pt")


def _torch_load(folder: Path, state: State) -> None:
    _copy_into(state, torch.load(folder / "state.pt", weights_only=True, mmap=True))


def _safetensors_save(folder: Path, state: State) -> None:
    safetensors.torch.save_file(dict(state), folder / "state.safetensors")


def _safetensors_load(folder: Path, state: State) -> None:
    _copy_into(state, safetensors.torch.load_file(folder / "state.safetensors"))


def _copy_into(state: State, loaded: State) -> None:
    for name, tensor in loaded.items():
        state[name].copy_(tensor)


def _meta_save(folder: Path, state: State) -> None:
    _meta_manager().save(os.fspath(folder / "step"), {"state": dict(state)})


def _meta_load(folder: Path, state: State) -> None:
    _meta_manager().load(os.fspath(folder / "step"), into={"state": dict(state)})


def without_direct_io(config: Any) -> Any:
    """Turn off direct I/O in a configuration of `torch_checkpointing`."""
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return config


@cache
def _meta_manager() -> Any:
    from torch_checkpointing import CheckpointManager

    return without_direct_io(CheckpointManager.Config.with_sync_save()).build()
