"""Layout of one rank's file: where everything in it lies, before a byte is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from holdfast.format import checksum, torchzip
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Span
from holdfast.format.names import data_file
from holdfast.format.region import Region


@dataclass(frozen=True, slots=True)
class TensorItem:
    """A region of a tensor in its place in the file."""

    name: str
    region: Region
    dtype: str
    item: Span
    data: Span
    """The raw elements, within the item."""

    prefix: bytes
    suffix: bytes
    first_block: int
    """How many blocks the file has before its own."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file before it is written: where everything in it lies."""

    name: str
    nbytes: int
    tensors: tuple[TensorItem, ...]
    containers: tuple[tuple[int, bytes], ...]
    """Values as `torch.save` writes them, by position; each stands once however often it occurs."""

    values: tuple[tuple[Collection[str], Span], ...]
    """Where the container of each value stands, with the names of the value."""

    table_offset: int
    """Where the checksums of all blocks stand, in the order of the items; they end the file."""


def lay_out(regions: Sequence[tuple[str, str, Region]]) -> tuple[TensorItem, ...]:
    """Where tensors lie in a file, one after the other. `regions` are name, dtype and region."""
    items, position, block = [], 0, 0
    for name, dtype, region in regions:
        shape = region.shape
        prefix, suffix = torchzip.frame(dtype, shape, position)
        nbytes = prod(shape) * dtype_of(dtype).itemsize
        item = Span(position, len(prefix) + nbytes + len(suffix))
        data = Span(position + len(prefix), nbytes)
        items.append(TensorItem(name, region, dtype, item, data, prefix, suffix, block))
        position = item.stop
        block += checksum.num_blocks(nbytes)
    return tuple(items)


def lay_out_file(
    rank: int,
    items: tuple[TensorItem, ...],
    values: Iterable[tuple[Collection[str], bytes]],
) -> FileLayout:
    """The file of `rank`: tensors as they were laid out, the containers of values behind them, then
    the checksums. `values` are names and container."""
    position = items[-1].item.stop if items else 0
    placed: dict[bytes, Span] = {}
    spans = []
    for names, container in values:
        if container not in placed:
            placed[container] = Span(position, len(container))
            position += len(container)
        spans.append((names, placed[container]))
    at = tuple((span.offset, container) for container, span in placed.items())
    num_blocks = items[-1].first_block + checksum.num_blocks(items[-1].data.nbytes) if items else 0
    nbytes = position + num_blocks * checksum.NBYTES
    return FileLayout(data_file(rank), nbytes, items, at, tuple(spans), position)
