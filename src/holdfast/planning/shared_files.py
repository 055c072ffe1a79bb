"""Decide which data files of an earlier checkpoint a rank links, and where it writes the rest.

A tensor that has not changed stays in the file in which it was written. A file in which only some
tensors have changed is linked too: their stale bytes cost space, but no time. A file of which more
than half is stale is not linked any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_128

from holdfast.format.checksum import num_blocks
from holdfast.format.dtypes import nbytes_of
from holdfast.format.manifest import Manifest, Table
from holdfast.format.names import data_file, rank_and_number
from holdfast.format.region import Region
from holdfast.planning.file_layout import FileLayout, TensorItem
from holdfast.planning.index import Index
from holdfast.planning.write_plan import GlobalPlan, Ints

LIVE_SHARE_MIN = 0.5
"""A file is linked only if the new checkpoint uses at least this share of the file's bytes. So
stale bytes at most double the size of a checkpoint."""

LINKED_FILES_MAX = 8
"""Most files that one rank links. If there are more, the tensors in the files with the fewest bytes
in use are written again, into one file."""

ItemKey = tuple[str, Region, str]
"""Name, region and dtype of an item."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A data file of a rank."""

    name: str
    nbytes: int
    table: Table
    num_links: int = 0
    """Number of saves that have linked the file since it was written, or last found good."""

    @property
    def number(self) -> int:
        """Number in the name: see `data_file`."""
        return number_of(self.name)


class StoredItem(NamedTuple):
    """Place of an item in a data file."""

    file: str
    offset: int
    nbytes: int
    data_offset: int
    """Offset of the elements in the file."""

    first_block: int
    """Number of the first block of the elements, counted from the start of the file."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The data files of one rank in a checkpoint."""

    checkpoint: str
    """Name of the checkpoint."""

    files: Mapping[str, StoredFile]
    items: Mapping[ItemKey, StoredItem]


def number_of(file: str) -> int:
    """Return the number in the name of a data file; 0 for an empty name."""
    return (rank_and_number(file) or (0, 0))[1]


def key_of(item: TensorItem) -> ItemKey:
    """Return the key of an item. It is the same in all saves with the same layout."""
    return item.name, item.region, item.dtype


def stored_items(layout: FileLayout) -> dict[ItemKey, StoredItem]:
    """Return the places of all items in a file."""
    return {
        key_of(i): StoredItem(
            layout.name,
            i.offset,
            i.stop - i.offset,
            i.data_offset,
            i.first_block,
            num_blocks(i.nbytes),
        )
        for i in layout.tensors
    }


def files_of_rank(rank: int, checkpoint: str, manifest: Manifest) -> RankFiles:
    """Find the data files of `rank`, and the items in them, in a manifest of Holdfast."""
    shared = manifest.shared or {}
    files = {
        name: StoredFile(name, nbytes, manifest.tables[name], shared.get(name, 0))
        for name, nbytes in manifest.files.items()
        if name in manifest.tables and (rank_and_number(name) or (None,))[0] == rank
    }
    items: dict[ItemKey, StoredItem] = {}
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            if chunk.file not in files or chunk.data_offset is None or chunk.first_block is None:
                continue
            items[name, chunk.region, entry.dtype] = StoredItem(
                chunk.file,
                chunk.item.offset,
                chunk.item.nbytes,
                chunk.data_offset,
                chunk.first_block,
                num_blocks(nbytes_of(entry.dtype, chunk.region.shape)),
            )
    return RankFiles(checkpoint, files, items)


def linkable(
    items: Iterable[TensorItem],
    earlier: RankFiles,
    unchanged: Collection[ItemKey],
) -> list[str]:
    """Choose the files of `earlier` to link, and return their names. `items`: all items of this
    save. `unchanged`: keys of the items whose bytes are the same in `earlier`."""
    live: dict[str, int] = {}
    for key in map(key_of, items):
        if key in unchanged:
            item = earlier.items[key]
            live[item.file] = live.get(item.file, 0) + item.nbytes
    files = [
        name
        for name, nbytes in live.items()
        if nbytes >= LIVE_SHARE_MIN * earlier.files[name].nbytes
    ]
    return sorted(files, key=lambda name: (-live[name], name))[:LINKED_FILES_MAX]


def free_numbers(linked: Iterable[str]) -> tuple[int, int]:
    """Find the two smallest file numbers that no linked file has."""
    taken = {*map(number_of, linked)}
    first, second = [n for n in range(len(taken) + 2) if n not in taken][:2]
    return first, second


def shared_index(
    index: Index, files: Sequence[Sequence[int]], values_in: Sequence[int], places: Sequence[Ints]
) -> Index:
    """Return an `Index` like `index`, for the same state stored in the given files.

    `files`: numbers of each rank's files, ascending. `values_in`: number of the file that has each
    rank's values. `places`: for each rank, an array with one row per item, in the order of the
    plan: the number of its file, then its `columns`.
    """
    digest = xxh3_128(repr((files, values_in)).encode())
    for rows in places:
        digest.update(rows.tobytes())
    return index.variant(
        digest.digest(), lambda: _shared_index(index.plan, files, values_in, places)
    )


def _shared_index(
    plan: GlobalPlan,
    files: Sequence[Sequence[int]],
    values_in: Sequence[int],
    places: Sequence[Ints],
) -> Index:
    """Make an `Index` whose plan has the number of a file in place of each rank, since an `Index`
    supports only one file per rank."""
    pairs = [(rank, number) for rank, numbers in enumerate(files) for number in numbers]
    file_at = {pair: file for file, pair in enumerate(pairs)}
    layouts = [places[rank][places[rank][:, 0] == number, 1:] for rank, number in pairs]
    file_of_item = [
        np.array([file_at[rank, number] for number in rows[:, 0].tolist()], np.int64)
        for rank, rows in enumerate(places)
    ]
    done = [0] * len(places)
    tensors = []
    for chunks in plan.tensors:
        written_by = chunks.rank.tolist()
        in_files = []
        for rank in written_by:
            in_files.append(file_of_item[rank][done[rank]])
            done[rank] += 1
        tensors.append(chunks._replace(rank=np.array(in_files, np.int64)))
    values = {
        name: (file_at[rank, values_in[rank]], path) for name, (rank, path) in plan.values.items()
    }
    names = [data_file(rank, number) for rank, number in pairs]
    return Index(replace(plan, tensors=tensors, values=values), layouts, names)
