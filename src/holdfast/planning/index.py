"""Both indices of a checkpoint, as far as the layout decides them: all but checksums and values."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from holdfast.format.manifest import Path
from holdfast.format.names import data_file
from holdfast.format.tables import StockIndex, TensorTable, encode_tensors
from holdfast.planning.file_layout import TensorItem
from holdfast.planning.write_plan import GlobalPlan, Ints, TensorChunks


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What does not change from save to save in the bytes of both indices."""

    tensors: bytes
    """The member of that name of `manifest.json`."""

    stock: StockIndex

    nbytes: Mapping[str | int, int]
    """Over all ranks, of the tensors below each top-level name."""


class Index:
    """What a layout decides of both indices of a checkpoint; rank 0 has it.

    Their bytes are made when they are first asked for, and kept. At thousands of ranks that takes
    minutes: nothing for training to wait for.
    """

    def __init__(self, plan: GlobalPlan, layouts: Sequence[Ints]) -> None:
        """`layouts`: what `columns` gives of each rank's items."""
        self.plan = plan
        self._layouts = layouts
        self._encoded: Encoded | None = None
        self._making = threading.Lock()

    @property
    def is_made(self) -> bool:
        return self._encoded is not None

    def encoded(self) -> Encoded:
        """The bytes; any thread may ask."""
        with self._making:
            if self._encoded is None:
                self._encoded = _encoded(self.plan, self._layouts)
                self._layouts = ()
            return self._encoded


def columns(items: Sequence[TensorItem]) -> Ints:
    """A row an item: offset, bytes, offset of its data, number of its first block."""
    rows = [(i.item.offset, i.item.nbytes, i.data.offset, i.first_block) for i in items]
    return np.array(rows, np.int64).reshape(len(rows), 4)


def _encoded(whole: GlobalPlan, layouts: Sequence[Ints]) -> Encoded:
    writing = {r for r, layout in enumerate(layouts) if len(layout)}
    writing |= {rank for rank, _ in whole.values.values()}
    files = {rank: number for number, rank in enumerate(sorted(writing))}
    values = {name: path for name, (_, path) in whole.values.items()}
    tables = list(_tables(whole, layouts, files))
    stock = StockIndex(tables, values, [data_file(rank) for rank in files])
    nbytes: Counter[str | int] = Counter()
    for placed in whole.tensors:
        nbytes[placed.tensor.path[0]] += placed.tensor.nbytes
    # Tied ones are stored under their first name, but here they are too.
    nbytes.update({path[0]: 0 for _, path in whole.aliases.values()})
    return Encoded(encode_tensors(tables), stock, nbytes)


def _tables(
    whole: GlobalPlan, layouts: Sequence[Ints], files: Mapping[int, int]
) -> Iterator[TensorTable]:
    """Every tensor with the places of its chunks."""
    places = _places(whole.tensors, layouts, files)
    aliases: dict[str, list[tuple[str, Path]]] = {}
    for alias, (first, path) in whole.aliases.items():
        aliases.setdefault(first, []).append((alias, path))
    at = 0
    for placed in whole.tensors:
        tensor, stop = placed.tensor, at + len(placed.rank)
        table = TensorTable(
            *(placed.name, tensor.dtype, tensor.shape, tensor.path),
            *(placed.start, placed.stop, places[at:stop]),
        )
        at = stop
        yield table
        for alias, path in aliases.get(placed.name, ()):
            yield replace(table, name=alias, path=path)


def _places(
    tensors: Sequence[TensorChunks], layouts: Sequence[Ints], files: Mapping[int, int]
) -> Ints:
    """Of every chunk, in the order of the plan, the number of its file, and what `columns` gives of
    its item. A rank's items lie in the order of the plan."""
    distinct = {id(layout): layout for layout in layouts}
    lengths = [len(layout) for layout in distinct.values()]
    starts = dict(zip(distinct, np.cumsum([0, *lengths]).tolist(), strict=False))
    first = np.array([starts[id(layout)] for layout in layouts], np.int64)
    number = np.zeros(len(layouts), np.int64)
    number[list(files)] = list(files.values())
    ranks = np.concatenate([np.zeros(0, np.int64), *(placed.rank for placed in tensors)])
    rows = np.concatenate([*distinct.values()])[first[ranks] + _times_before(ranks)]
    return np.column_stack([number[ranks], rows])


def _times_before(numbers: Ints) -> Ints:
    """For each number how often it has come before."""
    order = np.argsort(numbers, kind="stable")
    first = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    counts = np.diff(first, append=len(numbers))
    times = np.empty_like(numbers)
    times[order] = np.arange(len(numbers)) - np.repeat(first, counts)
    return times
