"""`holdfast.dcp.Reader` refuses what it cannot load exactly, before it changes anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import holdfast
from holdfast.dcp import Reader, Writer
from holdfast.errors import MismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KEPT: dict[str, Any] = {"w": torch.ones(3), "step": 7}


def refusal(folder: Path, tensor: torch.Tensor) -> MismatchError:
    """Return the error of a load into `tensor`, and check that the load changed nothing."""
    before = tensor.clone()
    state: dict[str, Any] = {"w": torch.zeros(3), "step": 0, "v": tensor}
    with pytest.raises(CheckpointException) as raised:
        dcp_load(state, storage_reader=Reader(folder))
    error = raised.value.failures[0][0]
    assert isinstance(error, MismatchError)
    assert "this rank changed nothing" in error.what
    assert torch.equal(tensor, before)
    assert state["w"].sum() == 0
    assert state["step"] == 0
    return error


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.tensor([1, 2**40]), torch.int32),
        (torch.tensor([1, 300]), torch.uint8),
        (torch.tensor([2**53 + 1]), torch.float64),
        (torch.tensor([1.5, -2.7]), torch.int32),
        (torch.tensor([1 + 2j]), torch.float32),
    ],
)
def test_numbers_that_a_dtype_cannot_represent_are_refused_as_by_load(
    stored: torch.Tensor, wanted: torch.dtype, tmp_path: Path
) -> None:
    """Method: the same checkpoint and target in `dcp.load` and in `holdfast.load`. Both messages
    have the same line about the tensor."""
    dcp_save({**KEPT, "v": stored}, storage_writer=Writer(tmp_path / "a"))
    error = refusal(tmp_path / "a", torch.zeros(stored.shape, dtype=wanted))
    with pytest.raises(MismatchError) as raised:
        holdfast.load(tmp_path / "a", {"v": torch.zeros(stored.shape, dtype=wanted)})
    assert error.what.splitlines()[1:] == raised.value.what.splitlines()[1:]


def test_numbers_that_a_dtype_can_represent_are_converted(tmp_path: Path) -> None:
    state: dict[str, Any] = {"v": torch.tensor([-5, 2**31 - 1]), "b": torch.tensor([True, False])}
    dcp_save(state, storage_writer=Writer(tmp_path / "a"))
    target = {"v": torch.zeros(2, dtype=torch.int32), "b": torch.zeros(2)}
    dcp_load(target, storage_reader=Reader(tmp_path / "a"))
    assert target["v"].tolist() == [-5, 2**31 - 1]
    assert target["b"].tolist() == [1, 0]


def test_an_expanded_tensor_is_refused_as_by_load(tmp_path: Path) -> None:
    dcp_save({**KEPT, "v": torch.arange(3.0)}, storage_writer=Writer(tmp_path / "a"))
    error = refusal(tmp_path / "a", torch.zeros(1).expand(3))
    with pytest.raises(MismatchError) as raised:
        holdfast.load(tmp_path / "a", {"v": torch.zeros(1).expand(3)})
    assert error.what.splitlines()[1:] == raised.value.what.splitlines()[1:]


class Rows(DefaultSavePlanner):
    """Stores each row of a tensor as a chunk of its own, as many ranks would."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [row for item in plan.items for row in self._rows(item)]
        self.plan = replace(plan, items=items)
        return self.plan

    def _rows(self, item: WriteItem) -> list[WriteItem]:
        if item.tensor_data is None or item.index.fqn != "v":
            return [item]
        num_rows, num_columns = item.tensor_data.size
        rows = []
        for number in range(num_rows):
            start, size = torch.Size([number, 0]), torch.Size([1, num_columns])
            data = replace(item.tensor_data, chunk=ChunkStorageMetadata(start, size))
            index = MetadataIndex("v", start, number)
            rows.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return rows

    def resolve_data(self, write_item: WriteItem) -> Any:
        index = write_item.index
        if index.offset is None or index.fqn != "v":
            return super().resolve_data(write_item)
        return self.state_dict["v"][index.offset[0] : index.offset[0] + 1]


def test_an_expanded_tensor_is_refused_if_each_chunk_has_one_row(tmp_path: Path) -> None:
    """Method: each read fills one row of the target, and no row shares memory with itself."""
    stored = torch.arange(6.0).view(3, 2)
    dcp_save({**KEPT, "v": stored}, storage_writer=Writer(tmp_path / "a"), planner=Rows())
    assert len(holdfast.open(tmp_path / "a").tensors["v"].chunks) == 3
    error = refusal(tmp_path / "a", torch.zeros(1, 2).expand(3, 2))
    assert "`v` is an expanded tensor" in error.what
    target = {"v": torch.zeros(3, 2)}
    dcp_load(target, storage_reader=Reader(tmp_path / "a"))
    assert torch.equal(target["v"], stored)
