"""Translate the plans of `torch.distributed.checkpoint` to Holdfast's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from holdfast.errors import UsageError
from holdfast.format.region import Region
from holdfast.format.untrusted import path_of
from holdfast.planning.file_layout import TensorItem, lay_out
from holdfast.planning.write_plan import GlobalPlan, Ints, LocalTensor, TensorChunks
from holdfast.saving.write import WriteResult
from holdfast.state.layout import dtype_name

Chunk = tuple[str, str, Region]
"""Name, dtype and region of a chunk to write."""


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """Write result of one rank, and the chunks that the rank has written."""

    rank: int
    result: WriteResult
    chunks: Sequence[tuple[str, Region]]
    """Name and region of each chunk, in the order of the file."""

    columns: Ints
    """Places of the chunks: see `planning.index.columns`."""


def is_value(item: WriteItem) -> bool:
    """Whether an item is a value, not a tensor."""
    return item.type == WriteItemType.BYTE_IO


def chunk_of(item: WriteItem) -> Chunk:
    """Return the name, dtype and region of a tensor item."""
    data = item.tensor_data
    assert data is not None, f"DCP plans `{item.index.fqn}` as a tensor, without its size"
    start, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    region = Region(start, tuple(map(int.__add__, start, sizes)))
    return item.index.fqn, dtype_name(data.properties.dtype), region


def layouts_of(plans: Sequence[SavePlan]) -> Iterator[tuple[TensorItem, ...]]:
    """For each rank, yield the regions of tensors that it writes, with their places in its file."""
    for plan in plans:
        yield lay_out([chunk_of(item) for item in plan.items if not is_value(item)])


def global_plan(metadata: Metadata, written: Sequence[Written]) -> tuple[GlobalPlan, list[Ints]]:
    """Return the global plan of what all ranks have written, and the places of each rank's chunks.
    The chunks are in the order of the plan.

    Raises:
        UsageError: the chunks of a tensor do not hold all of its elements.
    """
    entries, paths = metadata.state_dict_metadata, metadata.planner_data or {}
    number_of = {name: number for number, name in enumerate(entries)}
    ranks = {one.rank: one for one in written}
    rows: dict[str, list[tuple[int, Region]]] = {}
    layouts = [np.zeros((0, 4), np.int64)] * (max(ranks, default=-1) + 1)
    for rank in sorted(ranks):
        one = ranks[rank]
        order = sorted(range(len(one.chunks)), key=lambda row: number_of[one.chunks[row][0]])
        layouts[rank] = one.columns[order]
        for row in order:
            name, region = one.chunks[row]
            rows.setdefault(name, []).append((rank, region))
    tensors = []
    for name, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            path = path_of(paths.get(name, (name,)))
            tensor = LocalTensor(dtype_name(entry.properties.dtype), tuple(entry.size), path)
            tensors.append(_chunks(name, tensor, rows.get(name, [])))
    values = {
        name: (one.rank, path_of(paths.get(name, (name,))))
        for one in written
        for name in one.result.values
    }
    return GlobalPlan(tensors, values, {}), layouts


def _chunks(name: str, tensor: LocalTensor, rows: Sequence[tuple[int, Region]]) -> TensorChunks:
    num_planned = sum(region.num_elements for _, region in rows)
    if num_planned != prod(tensor.shape):
        raise UsageError(
            f"`{name}`: the planner had {num_planned} of {prod(tensor.shape)} elements saved",
            hint="nothing was published: check the planner, and that every rank calls `save`",
        )
    num_dims = len(tensor.shape)
    start = np.array([region.start for _, region in rows], np.int64).reshape(len(rows), num_dims)
    stop = np.array([region.stop for _, region in rows], np.int64).reshape(len(rows), num_dims)
    return TensorChunks(name, tensor, start, stop, np.array([rank for rank, _ in rows], np.int64))
