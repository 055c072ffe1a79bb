"""Ranks read replicas once and send them to each other: HSDP, and tensors whole on every rank; and
rows of which they want different columns."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import holdfast
from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.source import Source
from holdfast.comm import all_ranks
from holdfast.loading.load import Replicas, load_tree
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore
from processes import run_processes


class Model(nn.Module):
    """Model that is sharded over two ranks and replicated over two, except for a table of several
    messages and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(301, 1501)
        self.table = nn.Embedding(1000, 2500)
        self.norm = nn.LayerNorm(301)


def save_and_load(rank: int, size: int, path: Path) -> list[int]:
    """Save and load in each mode of `load_replicas`, and check the state. Returns the bytes that
    this rank reads in each mode."""
    torch.manual_seed(1)
    model = Model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.shared, mesh=mesh)
    holdfast.save(path, {"model": model, "seen": {"text": "hello"}})
    expected = [local(parameter).clone() for parameter in model.parameters()]
    store, read = LocalStore(path.parent), []
    ways: tuple[Replicas, ...] = ("read", "broadcast")
    for replicas in ways:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state = {"model": model, "seen": {"text": ""}}
        source = Source(store, path.name, open_manifest(store, path.name))
        ranks = all_ranks()
        loaded = load_tree(source, StateTree(state), ranks=ranks, replicas=replicas)
        ranks.close()
        read.append(loaded.nbytes)
        assert state["seen"] == {"text": "hello"}
        for parameter, saved in zip(model.parameters(), expected, strict=True):
            assert torch.equal(local(parameter), saved)
    return read


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def test_replicas_on_ranks_of_one_group_are_read_once(tmp_path: Path) -> None:
    """G6, G9. Method: save two replicas of a sharded layer, and an embedding and a norm on all four
    ranks. Zero them and load them in both modes. Every rank gets the saved bits.

    With `broadcast`, the ranks read the bytes of the model, plus at most the block that two shards
    share. Each rank reads a fair share.
    """
    nbytes = sum(parameter.nbytes for parameter in Model().parameters())
    by_itself, for_each_other = zip(
        *run_processes(4, save_and_load, tmp_path / "step-1"), strict=True
    )
    assert sum(by_itself) > 3 * nbytes
    assert nbytes <= sum(for_each_other) <= nbytes + (2 << 20)
    assert max(for_each_other) < nbytes / 2


def save_rows_and_load_columns(rank: int, size: int, path: Path) -> list[int]:
    """Save a matrix by rows and load it by columns in each mode of `load_replicas`. Returns the
    bytes that this rank reads in each mode."""
    torch.manual_seed(1)
    matrix, mesh = torch.randn(3000, 1201), init_device_mesh("cpu", (size,))
    holdfast.save(path, {"matrix": distribute_tensor(matrix, mesh, [Shard(0)])})
    store, read = LocalStore(path.parent), []
    ways: tuple[Replicas, ...] = ("read", "broadcast")
    for replicas in ways:
        columns = distribute_tensor(torch.zeros_like(matrix), mesh, [Shard(1)])
        source = Source(store, path.name, open_manifest(store, path.name))
        ranks = all_ranks()
        loaded = load_tree(source, StateTree({"matrix": columns}), ranks=ranks, replicas=replicas)
        ranks.close()
        read.append(loaded.nbytes)
        assert torch.equal(columns.to_local(), matrix.chunk(size, dim=1)[rank])
    return read


def test_rows_are_read_once_for_ranks_that_load_columns(tmp_path: Path) -> None:
    """G6, G9. Method: save a matrix by rows on four ranks, and load it by columns. With `read`,
    each rank reads all rows; with `broadcast`, all ranks together read each byte once."""
    nbytes = 4 * 3000 * 1201
    by_itself, for_each_other = zip(
        *run_processes(4, save_rows_and_load_columns, tmp_path / "step-1"), strict=True
    )
    assert sum(by_itself) > 3.5 * nbytes
    assert sum(for_each_other) == nbytes
    assert max(for_each_other) < nbytes / 2
