"""The bytes of a checkpoint against what was written: streamed, in threads, in bounded memory."""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

from holdfast.catalog.findings import Finding
from holdfast.errors import HoldfastError
from holdfast.format.archive import Record, read_records, windowed
from holdfast.format.checksum import Running, block_checksums, checksum, num_blocks
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry, ValueEntry
from holdfast.format.torchzip import frame, locate
from holdfast.storage.store import ReadStore

WINDOW_BYTES = 4 << 20
"""Read at once, a thread. With the threads below a quarter of what a check may hold in memory."""

THREADS_MAX = 4

Advance = Callable[[int], None]
"""Told how many bytes have been read, from any thread."""

Check = Callable[[], list[Finding]]


def run(checks: Iterable[Check]) -> Iterator[Finding]:
    """What the checks find, in their order. A few run at a time; later ones are not made yet."""
    threads = min(THREADS_MAX, (os.cpu_count() or 1) + 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-verify") as pool:
        waiting: deque[Future[list[Finding]]] = deque()
        for check in checks:
            waiting.append(pool.submit(check))
            if len(waiting) >= 2 * threads:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


@dataclass(frozen=True, slots=True)
class RecordReader:
    """One file of a checkpoint, to be read in windows."""

    store: ReadStore
    key: str
    file: str
    advance: Advance

    def fetch(self, offset: int, nbytes: int) -> bytes:
        """Bytes of the file, fewer only where it ends."""
        return self.store.read(self.key, offset, offset + nbytes)

    def windows(self, span: Span) -> Iterator[memoryview]:
        """The bytes of a span one window after the other, each good until the next; short where
        the file ends."""
        buffer = memoryview(bytearray(min(span.nbytes, WINDOW_BYTES)))
        for start in range(span.offset, span.stop, WINDOW_BYTES):
            window = buffer[: min(WINDOW_BYTES, span.stop - start)]
            done = self.store.read_into(self.key, start, window)
            self.advance(done)
            yield window[:done]


# ------------------------------------------------------------------------------- Holdfast's files


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of a file, and what its bytes should be: their checksums, or the bytes."""

    span: Span
    expected: _Sums | bytes
    entry: str


@dataclass(frozen=True, slots=True)
class _Sums:
    """Checksums of stretches that follow each other."""

    checksums: Sequence[int]
    nbytes: int
    """Of each stretch but the last."""

    first: int | None = None
    """Number of the first one, where they are blocks of a chunk."""


def check_pieces(
    manifest: Manifest,
    files: Iterable[str],
    checksums: Mapping[str, Sequence[int]],
    reader_of: Callable[[str], RecordReader],
) -> Iterator[Check]:
    """Checks of every byte of Holdfast's own files: blocks and values by their checksums, what
    stands around them as it is generated, and zeros between the items, should there be any.

    `checksums` are those of the blocks, of each file whose table could be read."""
    items: dict[str, list[tuple[Span, str, TensorEntry | ValueEntry, Chunk | None]]] = {}
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            items.setdefault(chunk.file, []).append((chunk.item, name, entry, chunk))
    for name, value in manifest.values.items():
        items.setdefault(value.file, []).append((value.item, name, value, None))
    for file in files:
        placed = sorted(items.get(file, ()), key=lambda item: (item[0].offset, item[0].nbytes))
        table = _Sums(checksums.get(file, ()), manifest.block_bytes)
        pieces = _pieces(placed, manifest.tables[file].offset, table)
        for window in _grouped(pieces):
            yield partial(_check_window, reader_of(file), window)


def _pieces(
    items: Sequence[tuple[Span, str, TensorEntry | ValueEntry, Chunk | None]],
    nbytes: int,
    table: _Sums,
) -> Iterator[_Piece]:
    """Of a file whose items end at `nbytes`; `table` has all of its blocks, or none."""
    position, before = 0, None
    for item, name, entry, chunk in items:
        if item == before:
            # The same item under another name: a tensor that two names share, a value seen twice.
            continue
        yield from _gap(position, item.offset)
        if chunk is not None and isinstance(entry, TensorEntry):
            yield from _chunk_pieces(name, entry.dtype, chunk, table)
        elif isinstance(entry, ValueEntry):
            yield _Piece(item, _Sums([entry.checksum or 0], item.nbytes), name)
        position, before = max(position, item.stop), item
    yield from _gap(position, nbytes)


def _gap(start: int, stop: int) -> Iterator[_Piece]:
    for at in range(start, stop, WINDOW_BYTES):
        nbytes = min(WINDOW_BYTES, stop - at)
        yield _Piece(Span(at, nbytes), bytes(nbytes), "")


def _chunk_pieces(name: str, dtype: str, chunk: Chunk, table: _Sums) -> Iterator[_Piece]:
    prefix, suffix = frame(dtype, chunk.region.shape, chunk.item.offset)
    start = chunk.data_offset if chunk.data_offset is not None else chunk.item.offset + len(prefix)
    stop = start + chunk.region.num_elements * dtype_of(dtype).itemsize
    yield _Piece(Span(chunk.item.offset, start - chunk.item.offset), prefix, name)
    before = chunk.first_block or 0
    for at in range(start, stop if table.checksums else start, WINDOW_BYTES):
        nbytes, first = min(WINDOW_BYTES, stop - at), (at - start) // table.nbytes
        last = first + num_blocks(nbytes, table.nbytes)
        sums = table.checksums[before + first : before + last]
        yield _Piece(Span(at, nbytes), _Sums(sums, table.nbytes, first), name)
    yield _Piece(Span(stop, chunk.item.stop - stop), suffix, name)


def _grouped(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that lie one after the other and fit into one window; a larger one alone."""
    group: list[_Piece] = []
    for piece in pieces:
        if group and (
            piece.span.offset != group[-1].span.stop
            or piece.span.stop - group[0].span.offset > WINDOW_BYTES
        ):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _check_window(reader: RecordReader, pieces: Sequence[_Piece]) -> list[Finding]:
    first, last = pieces[0].span.offset, pieces[-1].span.stop
    try:
        if last - first > WINDOW_BYTES:
            (piece,) = pieces
            running = Running()
            for window in reader.windows(piece.span):
                running.add(window)
            return _compare(reader.file, piece, [running.value])
        data = next(reader.windows(Span(first, last - first)), memoryview(b""))
    except HoldfastError as error:
        return [_unreadable(reader.file, pieces[0].entry, error)]
    findings = []
    for piece in pieces:
        view = data[piece.span.offset - first : piece.span.stop - first]
        if isinstance(piece.expected, _Sums):
            findings += _compare(reader.file, piece, block_checksums(view, piece.expected.nbytes))
        elif view != piece.expected:
            at = piece.span.offset + _first_difference(view, piece.expected)
            what = f"byte {at} around its data is not what was written"
            if not piece.entry:
                what = f"byte {at} belongs to no entry, and is not zero"
            findings.append(Finding("frame", reader.file, what, piece.entry))
    return findings


def _compare(file: str, piece: _Piece, found: Sequence[int]) -> list[Finding]:
    assert isinstance(piece.expected, _Sums)
    expected, first = piece.expected.checksums, piece.expected.first
    # Of what a file that ends early lacks there is not a byte.
    both = zip_longest(found, expected, fillvalue=checksum(b""))
    return [
        Finding(
            *("data", file, f"has checksum {one:016x}, which is not that of what was written"),
            *(piece.entry, None if first is None else first + n),
        )
        for n, (one, other) in enumerate(both)
        if one != other
    ]


def _first_difference(found: memoryview, expected: bytes) -> int:
    differing = (at for at, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
    return next(differing, min(len(found), len(expected)))


def _unreadable(file: str, entry: str, error: HoldfastError) -> Finding:
    return Finding("file", file, error.what, entry)


# -------------------------------------------------------------------- what torch.save has written


def check_containers(
    manifest: Manifest, reader_of: Callable[[str], RecordReader]
) -> Iterator[Check]:
    """Checks of every item of a stock checkpoint: what its container says it holds, and the CRC-32
    of each of its records."""
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            yield partial(_check_tensor, reader_of(chunk.file), name, entry, chunk)
    for name, value in manifest.values.items():
        yield partial(_check_value, reader_of(value.file), name, value.item)


def _check_tensor(
    reader: RecordReader, name: str, entry: TensorEntry, chunk: Chunk
) -> list[Finding]:
    try:
        stored = locate(reader.fetch, chunk.item, where=reader.file)
    except HoldfastError as error:
        return [Finding("data", reader.file, error.what, name)]
    if (stored.dtype, stored.shape) != (entry.dtype, chunk.region.shape):
        what = (
            f"is {stored.dtype} {list(stored.shape)} in its file, "
            f"{entry.dtype} {list(chunk.region.shape)} in the index"
        )
        return [Finding("data", reader.file, what, name)]
    return _check_value(reader, name, chunk.item)


def _check_value(reader: RecordReader, name: str, item: Span) -> list[Finding]:
    try:
        if reader.fetch(item.offset, 4) != b"PK\3\4":
            return [Finding("data", reader.file, "is no container of torch.save", name)]
        records = read_records(windowed(reader.fetch, item), item.nbytes)
        kept = keeps_checksums(records)
        return [
            finding
            for record in records
            for finding in check_record(reader, records, record, item.offset, name)
            if kept
        ]
    except HoldfastError as error:
        return [_unreadable(reader.file, name, error)]
    except (ValueError, LookupError, struct.error) as error:
        return [Finding("data", reader.file, f"is no container of torch.save: {error}", name)]


def keeps_checksums(records: Mapping[str, Record]) -> bool:
    """Whether an archive was written with CRC-32s; torch can be told to leave them out."""
    return any(record.crc32 for record in records.values())


def check_record(
    reader: RecordReader, records: Mapping[str, Record], name: str, position: int, entry: str
) -> list[Finding]:
    """One record of an archive that begins at `position`, against its CRC-32. `entry` is what is
    stored in it, for people."""
    record, found = records[name], 0
    for window in reader.windows(Span(position + record.data.offset, record.data.nbytes)):
        found = zlib.crc32(window, found)
    if found == record.crc32:
        return []
    what = f"`{name}` has CRC-32 {found:08x}, {record.crc32:08x} was written"
    return [Finding("data", reader.file, what, entry)]


def entries_by_record(manifest: Manifest, records: Mapping[str, Record]) -> dict[str, str]:
    """The tensors of a `.pt` file that lie in each of its records, for people."""
    placed = sorted((record.data.offset, name) for name, record in records.items())
    starts = [start for start, _ in placed]
    found: dict[str, list[str]] = {}
    for name, entry in manifest.tensors.items():
        at = bisect_right(starts, entry.chunks[0].item.offset) - 1
        found.setdefault(placed[max(at, 0)][1], []).append(name)
    return {record: ", ".join(names) for record, names in found.items()}
