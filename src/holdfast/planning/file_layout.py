"""Compute the offset of everything in a data file before a byte of it is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from holdfast.format import checksum, torchzip
from holdfast.format.dtypes import nbytes_of
from holdfast.format.manifest import Span
from holdfast.format.names import data_file
from holdfast.format.region import Region


class TensorItem(NamedTuple):
    """Region of a tensor, and its place in the file."""

    name: str
    region: Region
    dtype: str
    offset: int
    """Offset in the file. From there on the region is stored as `torch.save` writes it: prefix,
    elements, suffix."""

    prefix: bytes
    nbytes: int
    """Bytes of the elements."""

    suffix: bytes
    first_block: int
    """Number of the first block of the elements, counted from the start of the file."""

    @property
    def data_offset(self) -> int:
        """Offset of the elements in the file."""
        return self.offset + len(self.prefix)

    @property
    def data_stop(self) -> int:
        return self.data_offset + self.nbytes

    @property
    def stop(self) -> int:
        return self.data_stop + len(self.suffix)


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Offsets of everything in one file."""

    name: str
    nbytes: int
    tensors: tuple[TensorItem, ...]
    containers: tuple[tuple[int, bytes], ...]
    """Offset and bytes of each distinct container. Equal values are stored once."""

    values: tuple[tuple[Collection[str], Span], ...]
    """Names of each value, and the place of its container."""

    table_offset: int
    """Offset of the table at the end of the file: one checksum per block, in item order."""


def lay_out(regions: Sequence[tuple[str, str, Region]]) -> tuple[TensorItem, ...]:
    """Place regions of tensors in a file, one after the other. `regions`: for each one, the name
    and dtype of the tensor, and the region."""
    items, position, block = [], 0, 0
    # Thousands of tensors have the same region, as one object.
    sizes: dict[tuple[str, int], tuple[tuple[int, ...], int, int]] = {}
    for name, dtype, region in regions:
        known = sizes.get((dtype, id(region)))
        if known is None:
            shape = region.shape
            nbytes = nbytes_of(dtype, shape)
            known = sizes[dtype, id(region)] = (shape, nbytes, checksum.num_blocks(nbytes))
        shape, nbytes, num_blocks = known
        prefix, suffix = torchzip.frame(dtype, shape, position)
        items.append(TensorItem(name, region, dtype, position, prefix, nbytes, suffix, block))
        position += len(prefix) + nbytes + len(suffix)
        block += num_blocks
    return tuple(items)


def lay_out_file(
    rank: int,
    items: tuple[TensorItem, ...],
    values: Iterable[tuple[Collection[str], bytes]],
    number: int = 0,
) -> FileLayout:
    """Lay out a file of `rank`: its tensors, then the containers of its values, then the
    checksums. `values`: names and container of each value. `number`: number in the file's name:
    see `data_file`."""
    position = items[-1].stop if items else 0
    placed: dict[bytes, Span] = {}
    spans = []
    for names, container in values:
        if container not in placed:
            placed[container] = Span(position, len(container))
            position += len(container)
        spans.append((names, placed[container]))
    num_blocks = items[-1].first_block + checksum.num_blocks(items[-1].nbytes) if items else 0
    return FileLayout(
        name=data_file(rank, number),
        nbytes=position + num_blocks * checksum.NBYTES,
        tensors=items,
        containers=tuple((span.offset, container) for container, span in placed.items()),
        values=tuple(spans),
        table_offset=position,
    )


def containers_of(layout: FileLayout) -> list[tuple[Collection[str], bytes]]:
    """Return the names and the container of each value in a file."""
    containers = dict(layout.containers)
    return [(names, containers[span.offset]) for names, span in layout.values]
