"""Encode the part of a checkpoint's two indices, ours and that of stock DCP, that depends only on
the plan: everything except checksums and the places of values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from holdfast.format.manifest import Path
from holdfast.format.names import data_file
from holdfast.format.tables import (
    EncodedRows,
    Places,
    StockIndex,
    TensorTable,
    encode_rows,
    encode_tensors,
)
from holdfast.planning.file_layout import TensorItem
from holdfast.planning.host_file import TensorPlace
from holdfast.planning.write_plan import GlobalPlan, Ints, TensorChunks

_BATCH_ROWS = 1 << 14
"""Number of chunks that `_places` handles at a time."""

LISTED_CHUNKS_MAX = 8192
"""Most chunks that `manifest.json` lists itself. Decoding that many takes 0.1 s, and a load sends
them to every rank. A checkpoint with more chunks has them in `index.bin`."""


class Index:
    """Plan of a checkpoint on rank 0, and the part of both indices that depends only on the plan.

    The part is encoded on first use and reused by later saves. Encoding takes minutes at thousands
    of ranks, so training does not wait for it.
    """

    def __init__(
        self,
        plan: GlobalPlan,
        layouts: Sequence[Ints],
        names: Sequence[str] | None = None,
        places: Sequence[TensorPlace] | None = None,
    ) -> None:
        """`layouts`: for each rank, the array that `columns` returns for its items. `names`: the
        name of each rank's file. `places`: place of each rank's items in the file of its host; None
        if ranks have files of their own.

        If ranks have several files, `plan` and these arguments have the number of a file wherever
        they otherwise have a rank: see `shared_index`.
        """
        self.plan = plan
        self._layouts = layouts
        self._places = places
        self._names = [data_file(rank) for rank in range(len(layouts))] if names is None else names
        self._variants: dict[Hashable, Index] = {}
        self._encoded: Encoded | None = None
        self._mutex = threading.Lock()

    def encoded(self) -> Encoded:
        """Return the encoded part of both indices. Any thread may call this."""
        with self._mutex:
            if self._encoded is None:
                self._encoded = _encode(self.plan, self._layouts, self._names, self._places)
                self._layouts = ()
            return self._encoded

    @property
    def top_names(self) -> set[str | int]:
        """Top-level names of all tensors, under each name of tied ones."""
        paths = [chunks.tensor.path for chunks in self.plan.tensors]
        paths += [path for _, path in self.plan.aliases.values()]
        return {path[0] for path in paths}

    @cached_property
    def nbytes(self) -> Mapping[str | int, int]:
        """Bytes of all tensors below each top-level name, over all ranks. A tied tensor is counted
        under its first name."""
        nbytes: dict[str | int, int] = {}
        for chunks in self.plan.tensors:
            key = chunks.tensor.path[0]
            nbytes[key] = nbytes.get(key, 0) + chunks.tensor.nbytes
        return nbytes

    def variant(self, key: Hashable, make: Callable[[], Index]) -> Index:
        """Return the `Index` of the same state if it is stored in other files. `key`: identifies
        these files. `make`: makes the result, unless a recent call has made it."""
        variant = self._variants.pop(key, None) or make()
        self._variants[key] = variant
        # Keep two: a save shares files with the checkpoint before the previous one, so consecutive
        # saves use two sets of files in turn.
        for old in list(self._variants)[:-2]:
            del self._variants[old]
        return variant


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Part of both indices that stays the same from save to save."""

    tensors: bytes
    """Member `tensors` of `manifest.json`."""

    rows: EncodedRows | None
    """`index.bin`; None if `tensors` lists the chunks."""

    stock: StockIndex
    """Encoder of `.metadata`, which has encoded all but the positions of values."""


def columns(items: Sequence[TensorItem]) -> Ints:
    """Return an array with one row per item: the offset and size of the item, the offset of its
    data, and the number of its first block."""
    rows = [(i.offset, i.stop - i.offset, i.data_offset, i.first_block) for i in items]
    return np.array(rows, np.int64).reshape(len(rows), 4)


def _encode(
    plan: GlobalPlan,
    layouts: Sequence[Ints],
    names: Sequence[str],
    places: Sequence[TensorPlace] | None,
) -> Encoded:
    writing = {rank for rank, layout in enumerate(layouts) if len(layout)}
    writing |= {rank for rank, _ in plan.values.values()}
    owners = {rank: places[rank].leader if places else rank for rank in writing}
    numbers = {owner: number for number, owner in enumerate(sorted(set(owners.values())))}
    files = {rank: numbers[owner] for rank, owner in owners.items()}
    values = {name: path for name, (_, path) in plan.values.items()}
    tables = list(_tables(plan, layouts, files, places))
    stock = StockIndex(tables, values, [names[owner] for owner in numbers])
    num_chunks = sum(len(table.places) for table in tables)
    rows = encode_rows(tables) if num_chunks > LISTED_CHUNKS_MAX else None
    tensors = rows.tensors if rows else encode_tensors(tables)
    return Encoded(tensors, rows, stock)


def _tables(
    plan: GlobalPlan,
    layouts: Sequence[Ints],
    files: Mapping[int, int],
    places_in_files: Sequence[TensorPlace] | None,
) -> Iterator[TensorTable]:
    """Yield every tensor under each of its names, with the places of its chunks."""
    in_files = _places(plan.tensors, layouts, files, places_in_files)
    places: Places = in_files.tolist() if len(in_files) <= LISTED_CHUNKS_MAX else in_files
    aliases: dict[str, list[tuple[str, Path]]] = {}
    for alias, (first, path) in plan.aliases.items():
        aliases.setdefault(first, []).append((alias, path))
    first_row = 0
    for chunks in plan.tensors:
        tensor, stop_row = chunks.tensor, first_row + len(chunks.rank)
        table = TensorTable(
            chunks.name,
            tensor.dtype,
            tensor.shape,
            tensor.path,
            chunks.start,
            chunks.stop,
            places[first_row:stop_row],
        )
        first_row = stop_row
        yield table
        for alias, alias_path in aliases.get(chunks.name, ()):
            yield table._replace(name=alias, path=alias_path)


def _places(
    tensors: Sequence[TensorChunks],
    layouts: Sequence[Ints],
    files: Mapping[int, int],
    places_in_files: Sequence[TensorPlace] | None,
) -> Ints:
    """Return an array with one row per chunk, in the order of the plan: the number of its file, and
    the row that `columns` returns for it. Each rank's items are in the order of the plan."""
    distinct = {id(layout): layout for layout in layouts}
    lengths = [len(layout) for layout in distinct.values()]
    starts = dict(zip(distinct, np.cumsum([0, *lengths]).tolist(), strict=False))
    first_rows = np.array([starts[id(layout)] for layout in layouts], np.int64)
    file_numbers = np.zeros(len(layouts), np.int64)
    file_numbers[list(files)] = list(files.values())
    shifts = places_in_files or ()
    offsets = np.array([place.offset for place in shifts], np.int64)
    first_blocks = np.array([place.first_block for place in shifts], np.int64)
    ranks_of = [chunks.rank for chunks in tensors]
    writers = np.concatenate(ranks_of) if ranks_of else np.zeros(0, np.int64)
    # Add a first column for the file numbers here, so that the rows are copied only once.
    rows = np.pad(np.concatenate([*distinct.values()]), ((0, 0), (1, 0)))
    places: Ints = np.empty((len(writers), 5), np.int64)
    # For each rank, the row of its next item.
    next_rows = first_rows
    for first in range(0, len(writers), _BATCH_ROWS):
        # Arrays of a batch stay in the CPU cache.
        ranks, batch = writers[first : first + _BATCH_ROWS], places[first : first + _BATCH_ROWS]
        np.take(rows, next_rows[ranks] + _times_before(ranks), axis=0, out=batch, mode="clip")
        next_rows = next_rows + np.bincount(ranks, minlength=len(layouts))
        batch[:, 0] = file_numbers[ranks]
        if places_in_files is not None:
            batch[:, 1] += offsets[ranks]
            batch[:, 3] += offsets[ranks]
            batch[:, 4] += first_blocks[ranks]
    return places


def _times_before(numbers: Ints) -> Ints:
    """For each position in `numbers`, return how often its number occurs at earlier positions."""
    # numpy sorts 16-bit numbers by radix, several times as fast as longer ones.
    is_short = numbers.max(initial=0) < 1 << 16
    order = np.argsort(numbers.astype(np.uint16) if is_short else numbers, kind="stable")
    in_order = numbers[order]
    first = np.flatnonzero(np.append(True, in_order[1:] != in_order[:-1])) if len(order) else order
    counts = np.diff(first, append=len(numbers))
    times = np.empty_like(numbers)
    times[order] = np.arange(len(numbers)) - np.repeat(first, counts)
    return times
