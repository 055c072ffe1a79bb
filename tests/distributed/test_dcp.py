"""`holdfast.dcp` with several processes: FSDP2, tensor parallelism, HSDP, asynchronous saves,
failures of one rank."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    async_save,
)
from torch.distributed.checkpoint.state_dict_saver import (
    save as dcp_save,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import holdfast
import holdfast.dcp
from holdfast.dcp import Reader, Writer
from holdfast.storage.opening import store_to_save
from processes import run_processes
from s3_server import s3_server

WIDTH = 10
"""Not divisible by 4 or 3, so that shards are uneven and some are empty."""


class Block(nn.Module):
    """Two linear layers: one sharded by columns under tensor parallelism, one by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.up(x))
        return result


def build(layout: str, size: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model in one of four layouts, and an AdamW with the state of one step."""
    torch.manual_seed(seed)
    model = Block()
    if layout == "tp":
        mesh = init_device_mesh("cpu", (size,))
        plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh, plan)
    elif layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.full((2, WIDTH), float(seed + 1))).sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "step": 7, "empty": {}}


def whole(state: Any) -> Any:
    """The state with whole tensors in place of DTensors."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def save_all_ways(rank: int, size: int, folder: str, layout: str) -> Any:
    """Save one state by `save`, by `async_save` in a thread and a process, and by stock."""
    warnings.simplefilter("ignore")
    model, optimizer = build(layout, size, seed=1)
    state = state_of(model, optimizer)
    dcp_save(state, storage_writer=Writer(f"{folder}/sync"))
    saving: Any = async_save(state, storage_writer=Writer(f"{folder}/thread"))
    saving.result()
    saving = async_save(
        state,
        storage_writer=Writer(f"{folder}/process"),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    )
    saving.result()
    dcp_save(state, storage_writer=FileSystemWriter(f"{folder}/stock"))
    return whole(state)


def load_everything(rank: int, size: int, folder: str, layout: str) -> list[Any]:
    """What each checkpoint gives in another layout, by our reader and by stock's."""
    warnings.simplefilter("ignore")
    found = []
    for reader in (
        *(Reader(f"{folder}/{name}") for name in ("sync", "thread", "process", "stock")),
        FileSystemReader(f"{folder}/sync"),
    ):
        model, optimizer = build(layout, size, seed=2)
        state = state_of(model, optimizer)
        dcp_load(state, storage_reader=reader)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        found.append(whole(state_of(model, optimizer)))
    return found


@pytest.mark.parametrize(
    ("saved_as", "num_saved", "loaded_as", "num_loaded"),
    [
        ("fsdp", 2, "fsdp", 3),
        pytest.param("hsdp", 4, "tp", 2, marks=pytest.mark.slow),
        ("tp", 2, "plain", 1),
    ],
)
def test_layouts_load_across_each_other_and_stock(
    tmp_path: Path, saved_as: str, num_saved: int, loaded_as: str, num_loaded: int
) -> None:
    """Saved by one layout in four ways, loaded by another: all bits equal."""
    expected = run_processes(num_saved, save_all_ways, str(tmp_path), saved_as)[0]
    assert sorted(os.listdir(tmp_path)) == ["process", "stock", "sync", "thread"]  # noqa: PTH208
    for found in run_processes(num_loaded, load_everything, str(tmp_path), loaded_as):
        for state in found:
            assert same(state, expected)
    assert holdfast.open(tmp_path / "process").value("step") == 7


class Failing(DefaultSavePlanner):
    """Fails on one rank, when the file of this rank is half written."""

    def __init__(self, rank: int, failing: int) -> None:
        super().__init__()
        self._fails = rank == failing
        self._resolved = 0

    def resolve_data(self, write_item: WriteItem) -> Any:
        self._resolved += 1
        if self._fails and self._resolved == 2:
            raise RuntimeError("no more data")
        return super().resolve_data(write_item)


def fail_and_save_again(rank: int, size: int, folder: str, failing: int) -> list[str]:
    """A save over an old checkpoint fails on one rank; then one with a refused value on one rank;
    then one succeeds."""
    warnings.simplefilter("ignore")
    path = f"{folder}/a"
    old = {f"w{rank}": torch.full((300_000,), 1.0), f"v{rank}": torch.ones(3), "t": [1]}
    new = {f"w{rank}": torch.full((300_000,), 2.0), f"v{rank}": torch.ones(3), "t": [1]}
    dcp_save(old, storage_writer=Writer(path))
    errors = []
    for state, planner in (
        (new, Failing(rank, failing)),
        (new | ({f"bad{rank}": object()} if rank == failing else {}), DefaultSavePlanner()),
    ):
        with pytest.raises(CheckpointException) as raised:
            dcp_save(state, storage_writer=Writer(path), planner=planner)
        errors.append(str(raised.value))
        torch.distributed.barrier()
        assert os.listdir(folder) == ["a"]  # noqa: PTH208
        target = {f"w{rank}": torch.zeros(300_000)}
        dcp_load(target, storage_reader=Reader(path))
        assert target[f"w{rank}"][0] == 1
    dcp_save(new, storage_writer=Writer(path))
    dcp_load(target, storage_reader=Reader(path))
    assert target[f"w{rank}"][0] == 2
    return errors


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_rank_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, failing: int
) -> None:
    """G1. Method: every rank gets the error of the failed one; the next save succeeds."""
    for half_written, refused in run_processes(2, fail_and_save_again, str(tmp_path), failing):
        assert "no more data" in half_written
        assert f"`bad{failing}` is an object" in refused
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def save_to_bucket(rank: int, size: int, run: str, environment: dict[str, str]) -> list[str]:
    """Save shards to a bucket, in this process and in another, then fail over them, then succeed.
    Returns the errors of the saves that fail."""
    warnings.simplefilter("ignore")
    os.environ.update(environment)
    model, optimizer = build("fsdp", size, seed=1)
    state = state_of(model, optimizer)
    dcp_save(state, storage_writer=Writer(f"{run}/a"))
    saving: Any = async_save(
        state,
        storage_writer=Writer(f"{run}/process"),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    )
    saving.result()
    errors = []
    for other, planner in (
        (state, Failing(rank, failing=1)),
        (state | ({"bad": object()} if rank == 1 else {}), DefaultSavePlanner()),
    ):
        with pytest.raises(CheckpointException) as raised:
            dcp_save(other, storage_writer=Writer(f"{run}/a"), planner=planner)
        errors.append(str(raised.value))
    for name in ("a", "process", "a"):
        target = state_of(*build("fsdp", size, seed=2))
        dcp_load(target, storage_reader=Reader(f"{run}/{name}"))
        assert same(whole(target), whole(state))
        dcp_save(state, storage_writer=Writer(f"{run}/a"))
    return errors


def test_shards_are_saved_to_a_bucket(tmp_path: Path) -> None:
    """G1, G9. Method: two ranks, a real server of S3. A save that fails on one rank leaves the
    checkpoint before it. What it leaves in the bucket is gone after the next save."""
    server = s3_server()
    run = f"s3://{server.new_bucket()}/run"
    for half_written, refused in run_processes(2, save_to_bucket, run, server.environment):
        assert "no more data" in half_written
        assert "`bad` is an object" in refused
    with pytest.MonkeyPatch.context() as patched:
        for name, value in server.environment.items():
            patched.setenv(name, value)
        assert store_to_save(run).list() == ["a/", "process/"]
        assert holdfast.open(f"{run}/process").value("step") == 7


def save_with_cached_plans(rank: int, size: int, folder: str) -> None:
    """Three saves with cached plans, of which the last two have one path."""
    warnings.simplefilter("ignore")
    model, optimizer = build("fsdp", size, seed=1)
    for number, name in enumerate("abb"):
        state = state_of(model, optimizer) | {"step": number}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp_save(state, storage_writer=Writer(f"{folder}/{name}"), planner=planner)
        target = state_of(*build("fsdp", size, seed=2))
        dcp_load(target, storage_reader=Reader(f"{folder}/{name}"))
        assert same(whole(target), whole(state))
        optimizer.step()
    assert sorted(os.listdir(folder)) == ["a", "b"]  # noqa: PTH208


def test_cached_plans_of_several_ranks(tmp_path: Path) -> None:
    run_processes(2, save_with_cached_plans, str(tmp_path))


def installed(rank: int, size: int, folder: str) -> None:
    """Callers that name stock's classes, or none."""
    warnings.simplefilter("ignore")
    holdfast.dcp.install()
    state = state_of(*build("fsdp", size, seed=1))
    saves: list[dict[str, Any]] = [
        {"storage_writer": FileSystemWriter(f"{folder}/a")},
        {"checkpoint_id": f"{folder}/b"},
    ]
    for arguments in saves:
        dcp_save(state, **arguments)
    saving: Any = async_save(
        state,
        storage_writer=FileSystemWriter(f"{folder}/c"),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    )
    saving.result()
    for name in "abc":
        assert "manifest.json" in os.listdir(f"{folder}/{name}")  # noqa: PTH208
        target = state_of(*build("fsdp", size, seed=2))
        dcp_load(target, checkpoint_id=f"{folder}/{name}")
        assert same(whole(target), whole(state))


def test_install_in_several_ranks(tmp_path: Path) -> None:
    run_processes(2, installed, str(tmp_path))
