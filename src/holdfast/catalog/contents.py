"""Compares the bytes of a checkpoint with their checksums: in threads, with bounded memory."""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

from holdfast.catalog.findings import Finding, finding_of
from holdfast.errors import HoldfastError, StorageError
from holdfast.format.archive import RECORD, Record, read_records, windowed
from holdfast.format.checksum import block_checksums, checksum, checksum_of_parts, num_blocks
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry, ValueEntry
from holdfast.format.torchzip import PAGE_BYTES, PHASE_BYTES, frame, locate
from holdfast.storage.store import ReadStore

WINDOW_BYTES = 4 << 20
"""Bytes that a thread reads at once. A check holds this much data per thread in memory."""

THREADS_MAX = 4

Advance = Callable[[int], None]
"""Callback that gets the number of bytes just read. Any thread may call it."""

Check = Callable[[], list[Finding]]
"""Function that checks a part of a checkpoint and returns the findings."""


def run(checks: Iterable[Check]) -> Iterator[Finding]:
    """Run the checks in threads, and yield the findings in the order of `checks`.

    The next checks are taken from `checks` only as earlier ones finish, so that few are in memory.
    """
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
    """Reader of one file of a checkpoint."""

    store: ReadStore
    key: str
    file: str
    """Name of the file, for findings."""

    advance: Advance

    def fetch(self, offset: int, nbytes: int) -> bytes:
        """Read `nbytes` at `offset`; fewer at the end of the file."""
        return self.store.read(self.key, offset, offset + nbytes)

    def windows(self, span: Span) -> Iterator[memoryview]:
        """Yield the bytes of a span, in windows of at most `WINDOW_BYTES`. If the file ends inside
        the span, windows are shorter or empty. Each window overwrites the one before."""
        buffer = memoryview(bytearray(min(span.nbytes, WINDOW_BYTES)))
        with self.store.open(self.key) as reader:
            for start in range(span.offset, span.stop, WINDOW_BYTES):
                window = buffer[: min(WINDOW_BYTES, span.stop - start)]
                nbytes = reader.read_into(start, window)
                self.advance(nbytes)
                yield window[:nbytes]


# ------------------------------------------------------------------------------- Holdfast's files


@dataclass(frozen=True, slots=True)
class _Section:
    """A span of a file, with its expected bytes, or with the checksums of its blocks."""

    span: Span
    entry: str
    """Name of the tensor or value; empty for bytes between entries."""

    expected: bytes = b""
    checksums: Sequence[int] = ()
    block_bytes: int = 0
    """Bytes that each checksum covers; the last may cover fewer. 0: there are no checksums."""

    first: int | None = None
    """Index of the section's first block in its chunk; None for a value, which has one checksum."""


_Item = tuple[Span, str, str, Chunk | ValueEntry]
"""Span, name, dtype and description of a chunk or value. The dtype of a value is empty."""


def check_files(
    manifest: Manifest,
    files: Iterable[str],
    checksums: Mapping[str, Sequence[int]],
    reader_of: Callable[[str], RecordReader],
) -> Iterator[Check]:
    """Yield checks of every byte of the data files `files` of a checkpoint of Holdfast.

    Blocks and values are compared with their checksums, the bytes around them with the bytes that a
    save writes there, and gaps between items with zeros. Gaps in a shared file are not checked.
    `checksums`: block checksums of each file whose table could be read. `reader_of`: function that
    returns the reader of a file.
    """
    items: dict[str, list[_Item]] = {}
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            items.setdefault(chunk.file, []).append((chunk.item, name, entry.dtype, chunk))
    for name, value in manifest.values.items():
        items.setdefault(value.file, []).append((value.item, name, "", value))
    for file in files:
        in_order = sorted(items.get(file, ()), key=lambda item: (item[0].offset, item[0].nbytes))
        table, stop = checksums.get(file, ()), manifest.tables[file].offset
        sections = _sections(in_order, stop, table, manifest.block_bytes)
        if file in (manifest.shared or ()):
            # A shared file still holds items of earlier checkpoints that this one does not use.
            # They look like gaps here, but are not zeros.
            sections = (section for section in sections if section.entry)
        for group in _grouped(sections):
            yield partial(_check_group, reader_of(file), group)


def _sections(
    items: Sequence[_Item], nbytes: int, table: Sequence[int], block_bytes: int
) -> Iterator[_Section]:
    """Divide the first `nbytes` of a file into sections. `items`: chunks and values in the file, in
    order. `table`: checksums of all blocks of the file; empty if they could not be read."""
    position, previous = 0, None
    for item, name, dtype, content in items:
        if item == previous:
            continue  # Tied tensors and shared values are stored once.
        yield from _gap(position, item.offset)
        if isinstance(content, Chunk):
            yield from _chunk_sections(name, dtype, content, table, block_bytes)
        else:
            sums = [content.checksum or 0]
            yield _Section(item, name, checksums=sums, block_bytes=item.nbytes)
        position, previous = max(position, item.stop), item
    yield from _gap(position, nbytes)


def _gap(start: int, stop: int) -> Iterator[_Section]:
    for offset in range(start, stop, WINDOW_BYTES):
        nbytes = min(WINDOW_BYTES, stop - offset)
        yield _Section(Span(offset, nbytes), "", bytes(nbytes))


def _chunk_sections(
    name: str, dtype: str, chunk: Chunk, table: Sequence[int], block_bytes: int
) -> Iterator[_Section]:
    # Older versions of Holdfast started large data on a page.
    is_on_page = chunk.data_offset is not None and chunk.data_offset % PAGE_BYTES == 0
    phase = 0 if is_on_page else PHASE_BYTES
    prefix, suffix = frame(dtype, chunk.region.shape, chunk.item.offset, phase)
    start = chunk.data_offset if chunk.data_offset is not None else chunk.item.offset + len(prefix)
    stop = start + chunk.region.num_elements * dtype_of(dtype).itemsize
    yield _Section(Span(chunk.item.offset, start - chunk.item.offset), name, prefix)
    chunk_first = chunk.first_block or 0
    for offset in range(start, stop if table else start, WINDOW_BYTES):
        nbytes, first = min(WINDOW_BYTES, stop - offset), (offset - start) // block_bytes
        last = first + num_blocks(nbytes, block_bytes)
        sums = table[chunk_first + first : chunk_first + last]
        span = Span(offset, nbytes)
        yield _Section(span, name, checksums=sums, block_bytes=block_bytes, first=first)
    yield _Section(Span(stop, chunk.item.stop - stop), name, suffix)


def _grouped(sections: Iterable[_Section]) -> Iterator[list[_Section]]:
    """Group adjacent sections that fit into one window. A larger section is a group of its own."""
    group: list[_Section] = []
    for section in sections:
        if group and (
            section.span.offset != group[-1].span.stop
            or section.span.stop - group[0].span.offset > WINDOW_BYTES
        ):
            yield group
            group = []
        group.append(section)
    if group:
        yield group


def _check_group(reader: RecordReader, sections: Sequence[_Section]) -> list[Finding]:
    start, stop = sections[0].span.offset, sections[-1].span.stop
    try:
        if stop - start > WINDOW_BYTES:
            (section,) = sections
            digest = checksum_of_parts(reader.windows(section.span))
            return _compare(reader.file, section, [digest])
        data = next(reader.windows(Span(start, stop - start)), memoryview(b""))
    except HoldfastError as error:
        return [finding_of("file", reader.file, error, sections[0].entry)]
    findings = []
    for section in sections:
        found = data[section.span.offset - start : section.span.stop - start]
        if section.block_bytes:
            sums = block_checksums(found, section.block_bytes)
            findings += _compare(reader.file, section, sums)
        elif found != section.expected:
            pairs = enumerate(zip(found, section.expected, strict=False))
            shorter = min(len(found), len(section.expected))
            index = next((index for index, (a, b) in pairs if a != b), shorter)
            what = f"byte {section.span.offset + index} around its data is not what was written"
            if not section.entry:
                what = f"byte {section.span.offset + index} belongs to no entry, and is not zero"
            findings.append(Finding("frame", reader.file, what, section.entry))
    return findings


def _compare(file: str, section: _Section, checksums: Sequence[int]) -> list[Finding]:
    # If the file ends early, count each missing block as empty.
    pairs = zip_longest(checksums, section.checksums, fillvalue=checksum(b""))
    return [
        Finding(
            concern="data",
            file=file,
            what=f"has checksum {found:016x}, which is not that of what was written",
            entry=section.entry,
            block=None if section.first is None else section.first + n,
        )
        for n, (found, written) in enumerate(pairs)
        if found != written
    ]


# ------------------------------------------------------------------------- files of stock torch


def check_containers(
    manifest: Manifest, skipped: Collection[str], reader_of: Callable[[str], RecordReader]
) -> Iterator[Check]:
    """Yield checks of every item of a stock checkpoint: whether it has the dtype and shape that
    the index states, and whether each record of its archive matches its CRC-32. Items in `skipped`
    files are not checked. `reader_of`: function that returns the reader of a file."""
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            if chunk.file not in skipped:
                yield partial(_check_tensor, reader_of(chunk.file), name, entry, chunk)
    for name, value in manifest.values.items():
        if value.file not in skipped:
            yield partial(_check_value, reader_of(value.file), name, value.item)


def _check_tensor(
    reader: RecordReader, name: str, entry: TensorEntry, chunk: Chunk
) -> list[Finding]:
    try:
        stored = locate(reader.fetch, chunk.item, where=reader.file)
    except StorageError as error:
        return [finding_of("file", reader.file, error, name)]
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
        if reader.fetch(item.offset, len(RECORD)) != RECORD:
            return [Finding("data", reader.file, "is no container of torch.save", name)]
        records = read_records(windowed(reader.fetch, item), item.nbytes)
        findings = []
        for record in records:
            findings += check_record(reader, records, record, item.offset, name)
        # A container without checksums is read too, to notice bytes that the disk cannot return.
        # Its records state 0 as CRC-32, so findings about their CRC-32s mean nothing.
        return findings if has_checksums(records) else []
    except HoldfastError as error:
        return [finding_of("file", reader.file, error, name)]
    except (ValueError, LookupError, struct.error) as error:
        return [Finding("data", reader.file, f"is no container of torch.save: {error}", name)]


def has_checksums(records: Mapping[str, Record]) -> bool:
    """Return whether the records of a ZIP archive have CRC-32s. torch can leave them out."""
    return any(record.crc32 for record in records.values())


def check_record(
    reader: RecordReader, records: Mapping[str, Record], name: str, position: int, entry: str
) -> list[Finding]:
    """Compare record `name` of a ZIP archive with its CRC-32. `records`: all records of the
    archive. `position`: offset of the archive in the file. `entry`: name of the tensor or value,
    for the finding."""
    record, crc32 = records[name], 0
    for window in reader.windows(Span(position + record.data.offset, record.data.nbytes)):
        crc32 = zlib.crc32(window, crc32)
    if crc32 == record.crc32:
        return []
    what = f"`{name}` has CRC-32 {crc32:08x}, {record.crc32:08x} was written"
    return [Finding("data", reader.file, what, entry)]


def entries_by_record(manifest: Manifest, records: Mapping[str, Record]) -> dict[str, str]:
    """Return the names of the tensors in each record of a `.pt` file, joined by commas, by the
    name of the record. Records without tensors are left out."""
    by_offset = sorted((record.data.offset, name) for name, record in records.items())
    offsets = [offset for offset, _ in by_offset]
    names: dict[str, list[str]] = {}
    for name, entry in manifest.tensors.items():
        index = bisect_right(offsets, entry.chunks[0].item.offset) - 1
        names.setdefault(by_offset[max(index, 0)][1], []).append(name)
    return {record: ", ".join(tensors) for record, tensors in names.items()}
