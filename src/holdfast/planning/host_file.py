"""Decide where each rank writes in the one data file of its host.

The file has the tensors of all ranks of the host, then their values, then their checksums. Values
change their sizes from save to save. Since they come after the tensors, the tensors keep their
positions, and the index of the tensors can be reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.format import checksum
from holdfast.format.names import data_file
from holdfast.planning.file_layout import FileLayout

ALIGN_BYTES = 64 << 10
"""Alignment of every part of a file that one rank writes: the largest page size of any system. If
one process writes to a page by direct I/O and another one through the page cache, the cached page
can overwrite the direct write. It is also a multiple of the alignment that elements need in a file,
so a rank's layout, which starts at offset 0, is valid at every aligned offset too."""

_ALIGN_BLOCKS = ALIGN_BYTES // checksum.NBYTES


@dataclass(frozen=True, slots=True)
class PartSize:
    """Sizes of the data that one rank writes."""

    tensors: int
    """Bytes of the items of all tensors."""

    num_blocks: int
    values: int
    """Bytes of the containers of all values."""

    @property
    def nbytes(self) -> int:
        return self.tensors + self.values + self.num_blocks * checksum.NBYTES


@dataclass(frozen=True, slots=True)
class FilePart:
    """Part that one rank writes of the data file of its host."""

    file: str
    nbytes: int
    """Size of the file; 0 if no rank of the host writes anything."""

    leads: bool
    """Whether this rank creates and syncs the file."""

    tensors_at: int
    """Offset of this rank's tensors."""

    values_at: int
    """Offset of this rank's values."""

    table_offset: int
    """Offset of the table of all checksums, which ends the file."""

    first_block: int
    """Index of this rank's first checksum in the table."""

    @property
    def checksums_at(self) -> int:
        """Offset of this rank's checksums."""
        return self.table_offset + self.first_block * checksum.NBYTES


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Place of a rank's tensors in the data file of its host. It depends only on the plan."""

    leader: int
    """Lowest rank of the host. It creates the file, which is named after this rank."""

    offset: int
    first_block: int


def size_of(layout: FileLayout) -> PartSize:
    """Return the sizes of the data in a file that is laid out for one rank."""
    tensors = tensors_stop(layout)
    num_blocks = (layout.nbytes - layout.table_offset) // checksum.NBYTES
    return PartSize(tensors, num_blocks, layout.table_offset - tensors)


def tensors_stop(layout: FileLayout) -> int:
    """Return the offset at which the tensors of a file end and its values begin."""
    return layout.tensors[-1].stop if layout.tensors else 0


def place_tensors(hosts: Sequence[str], sizes: Sequence[PartSize]) -> list[TensorPlace]:
    """Place the tensors of each rank in the file of its host. `hosts`, `sizes`: the host of each
    rank, and the sizes of its data."""
    leaders: dict[str, int] = {}
    ends: dict[str, tuple[int, int]] = {}
    places = []
    for rank, (host, size) in enumerate(zip(hosts, sizes, strict=True)):
        offset, block = ends.get(host, (0, 0))
        places.append(TensorPlace(leaders.setdefault(host, rank), offset, block))
        ends[host] = (
            offset + _aligned(size.tensors, ALIGN_BYTES),
            block + _aligned(size.num_blocks, _ALIGN_BLOCKS),
        )
    return places


def place_parts(hosts: Sequence[str], sizes: Sequence[PartSize]) -> list[FilePart]:
    """Place everything that each rank writes in the file of its host: see `place_tensors`."""
    places = place_tensors(hosts, sizes)
    ranks_of: dict[int, list[int]] = {}
    for rank, place in enumerate(places):
        ranks_of.setdefault(place.leader, []).append(rank)
    parts: dict[int, FilePart] = {}
    for leader, ranks in ranks_of.items():
        last = ranks[-1]
        stop = places[last].offset + sizes[last].tensors
        values_at = []
        for rank in ranks:
            values_at.append(_aligned(stop, ALIGN_BYTES))
            stop = values_at[-1] + sizes[rank].values
        table_offset = _aligned(stop, ALIGN_BYTES)
        num_blocks = places[last].first_block + sizes[last].num_blocks
        is_empty = not any(sizes[rank].nbytes for rank in ranks)
        for rank, start in zip(ranks, values_at, strict=True):
            parts[rank] = FilePart(
                file=data_file(leader),
                nbytes=0 if is_empty else table_offset + num_blocks * checksum.NBYTES,
                leads=rank == leader,
                tensors_at=places[rank].offset,
                values_at=start,
                table_offset=table_offset,
                first_block=places[rank].first_block,
            )
    return [parts[rank] for rank in range(len(places))]


def _aligned(number: int, align: int) -> int:
    return -(-number // align) * align
