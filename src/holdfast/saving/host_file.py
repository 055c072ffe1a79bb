"""Write the data of all ranks of a host into one file, which one of them creates and syncs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

from holdfast.comm import Ranks, capture, run_on_all
from holdfast.errors import HoldfastError, StorageError
from holdfast.format.checksum import checksum
from holdfast.format.manifest import Span, Table
from holdfast.planning.file_layout import FileLayout
from holdfast.planning.host_file import FilePart, tensors_stop
from holdfast.saving.write import WriteResult
from holdfast.storage.store import Buffer, Creating, FileWriter, Joining, Store
from holdfast.timing import Spans

WritePart = Callable[[Creating], WriteResult]
"""Function that writes the file of one rank by `write`. Its argument takes the place of the store,
and puts what is written into the file of the host."""


def write_together(
    store: Store,
    folder: str,
    layout: FileLayout,
    part: FilePart,
    *,
    before: Callable[[], None],
    write_part: WritePart,
    spans: Spans,
    ranks: Ranks,
) -> WriteResult | HoldfastError:
    """Write this rank's part of the file of its host, and sync the file on the rank that leads the
    host. Returns what `commit` needs: the result, or the error of the sync.

    `layout`: layout of a file with only this part. `before`: called on each rank before any rank
    writes.

    Collective: every rank calls this. No file is synced before all ranks have written. Any earlier
    error of one rank is raised on all.
    """
    key = f"{folder}/{part.file}"
    with ExitStack() as created:
        writers: list[FileWriter] = []

        def create() -> None:
            before()
            if part.leads and part.nbytes:
                with spans("write"):
                    writers.append(created.enter_context(store.create(key, part.nbytes)))

        def write() -> WriteResult:
            return write_part(_PartOf(store, key, layout, part, writers))

        run_on_all(ranks, create)
        result = _placed(run_on_all(ranks, write), layout, part)
        if not writers:
            return result

        def sync() -> WriteResult:
            with spans("sync"):
                created.close()
                packed = store.read(key, part.table_offset, part.nbytes)
            if len(packed) != part.nbytes - part.table_offset:
                raise StorageError(f"`{part.file}` ends at {part.table_offset + len(packed)}")
            table = Table(part.table_offset, checksum(packed))
            return replace(result, nbytes=part.nbytes, table=table)

        return capture(sync)


def _placed(result: WriteResult, layout: FileLayout, part: FilePart) -> WriteResult:
    """Return a result with the positions of its values in the file of the host, not in `layout`.
    Leave out size and table, which the rank that leads the host adds."""
    moved = part.values_at - tensors_stop(layout)
    values = {
        name: (Span(item.offset + moved, item.nbytes), container_checksum)
        for name, (item, container_checksum) in result.values.items()
    }
    return WriteResult(part.file, values=values)


@dataclass(frozen=True, slots=True)
class _PartOf:
    """Stand-in for the store: the only file that it creates is this rank's part of the file of its
    host."""

    store: Store
    key: str
    layout: FileLayout
    part: FilePart
    created: Sequence[FileWriter]
    """Writer of the whole file, if this rank has created it."""

    @contextmanager
    def create(self, _: str, nbytes: int) -> Iterator[FileWriter]:
        """Open the part of `nbytes`, as if it were a file."""
        assert nbytes == self.layout.nbytes
        assert isinstance(self.store, Joining), "the start of the run has checked it"
        opened: AbstractContextManager[FileWriter]
        opened = nullcontext(self.created[0]) if self.created else self.store.join(self.key)
        with opened as writer:
            yield _PartWriter(writer, self.layout, self.part)


class _PartWriter:
    """Writer of one rank's file that puts its bytes at their places in the file of the host."""

    def __init__(self, writer: FileWriter, layout: FileLayout, part: FilePart) -> None:
        values, table = tensors_stop(layout), layout.table_offset
        self._writer = writer
        self._sections = (
            (0, values, part.tensors_at),
            (values, table, part.values_at),
            (table, layout.nbytes, part.checksums_at),
        )

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        for part in parts:
            stop = offset + len(part)
            for first, last, placed_at in self._sections:
                start, end = max(offset, first), min(stop, last)
                if start < end:
                    piece = memoryview(part)[start - offset : end - offset]
                    self._writer.write(placed_at + start - first, [piece])
            offset = stop
