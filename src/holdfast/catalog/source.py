"""Reads the data of an open checkpoint, and checks every block."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from holdfast.catalog.catalog import location, missing_file_error, read_checksums, verify_hint
from holdfast.errors import DamagedError, NotFoundError
from holdfast.format.archive import Fetch
from holdfast.format.checksum import BLOCK_BYTES_MAX, checksum, num_blocks
from holdfast.format.manifest import Chunk, Manifest, Span, ValueEntry
from holdfast.format.torchzip import StoredTensor, locate
from holdfast.storage.store import Distant, FileReader, ReadStore

WINDOW_BYTES = 2 << 20
"""Most bytes that `ChunkData.window` returns. Few enough to stay in the CPU cache between the
checksum and the copy to the target."""

ROOM_BYTES = WINDOW_BYTES + 2 * BLOCK_BYTES_MAX
"""Bytes of each thread's buffer: a window, extended to whole blocks at both ends."""

CHECKED_BYTES = 512 << 10
"""Bytes of a local file that are read before their checksums are computed, or one block if that is
larger. Few enough to be still in the cache of the core then."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that is open for reading."""

    store: ReadStore
    folder: str
    manifest: Manifest
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    """Block checksums of each file, filled when the file is first read from."""

    @property
    def url(self) -> str:
        return location(self.store, self.folder)

    @property
    def hint(self) -> str:
        """Hint for errors about damage."""
        return verify_hint(self.url)

    @property
    def request_bytes(self) -> int | None:
        """Bytes to read in one request, if the store is reached over a network; else None."""
        return self.store.request_bytes if isinstance(self.store, Distant) else None

    def key(self, file: str) -> str:
        return f"{self.folder}/{file}"

    def checksums(self, chunk: Chunk, nbytes: int) -> tuple[int, ...] | None:
        """Return the block checksums of a chunk of `nbytes` bytes; None if the format has none."""
        if chunk.first_block is None:
            return None
        if chunk.file not in self.tables:
            # Without a lock, two threads may both read the table. This costs less than a lock.
            try:
                self.tables[chunk.file] = read_checksums(
                    self.store, self.folder, self.manifest, chunk.file
                )
            except NotFoundError as error:
                raise missing_file_error(self.store, self.folder, chunk.file) from error
        stop = chunk.first_block + num_blocks(nbytes, self.manifest.block_bytes)
        return self.tables[chunk.file][chunk.first_block : stop]


def fetcher(store: ReadStore, key: str) -> Fetch:
    """Return a function that reads `nbytes` at `offset` of a file."""
    return lambda offset, nbytes: store.read(key, offset, offset + nbytes)


def locate_chunk(source: Source, name: str, chunk: Chunk) -> StoredTensor:
    """Find the bytes and the strides of a chunk of tensor `name` in its file. Reads the pickle of
    the `torch.save` archive around them, since the index states neither. Raises a DamagedError if
    the archive has another dtype or shape than the index."""
    dtype, shape = source.manifest.tensors[name].dtype, chunk.region.shape
    fetch = fetcher(source.store, source.key(chunk.file))
    stored = locate(fetch, chunk.item, where=f"{chunk.file}:{name}")
    if (stored.dtype, stored.shape) != (dtype, shape):
        raise DamagedError(
            f"`{source.url}/{chunk.file}`: `{name}` is {stored.dtype} {list(stored.shape)} in its "
            f"file, {dtype} {list(shape)} in the index",
            hint=source.hint,
            file=f"{source.url}/{chunk.file}",
            entry=name,
        )
    return stored


def read_value(source: Source, name: str, entry: ValueEntry) -> bytes:
    """Read the container of a value, and check its checksum if the manifest has one."""
    try:
        data = source.store.read(source.key(entry.file), entry.item.offset, entry.item.stop)
    except NotFoundError as error:
        raise missing_file_error(source.store, source.folder, entry.file) from error
    if len(data) != entry.item.nbytes:
        raise DamagedError(
            f"`{source.url}/{entry.file}` ends inside value `{name}`",
            hint=source.hint,
            file=f"{source.url}/{entry.file}",
            entry=name,
        )
    if entry.checksum is not None and checksum(data) != entry.checksum:
        raise DamagedError(
            f"`{source.url}/{entry.file}`: value `{name}` has checksum {checksum(data):016x}, "
            f"the manifest says {entry.checksum:016x}",
            hint=source.hint,
            file=f"{source.url}/{entry.file}",
            entry=name,
        )
    return data


class ChunkData:
    """Reader of ranges of one chunk's raw data. Checks every block that a range touches.

    If two consecutive ranges share a block, it is read and checked only once.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        location: tuple[str, Span],
        checksums: Sequence[int] | None,
        reader: FileReader,
        room: memoryview,
    ) -> None:
        """`name`: name of the tensor. `location`: file of the chunk, and span of the raw data in
        that file. `checksums`: of the blocks of the chunk; None if the format has none. `reader`:
        reader of that file. `room`: buffer of `ROOM_BYTES`."""
        self.name = name
        self._source, (self._file, self._span) = source, location
        self._checksums, self._reader, self._room = checksums, reader, room
        block = source.manifest.block_bytes
        self._step = source.request_bytes or max(1, CHECKED_BYTES // block) * block
        self._in_room = (0, 0)
        self._crc32: tuple[int, int] | None = None
        self.num_read: int = 0
        """Number of bytes read so far."""

    def with_crc32(self, expected: int) -> ChunkData:
        """Let `finish` check the CRC-32 that `torch.save` wrote. The caller must then read all data
        in order."""
        self._crc32 = (0, expected)
        return self

    def read(self, start: int, stop: int, target: memoryview) -> None:
        """Read bytes `start` to `stop` into `target`."""
        if self._checksums is None:
            self._fill(start, target)
            return
        # The first and the last block may be needed only in part, but are checked as a whole: read
        # them into the buffer. Read all other blocks straight into the target.
        block = self._source.manifest.block_bytes
        first = min(-(-start // block) * block, stop)
        last = stop if stop == self._span.nbytes else max(first, stop // block * block)
        if start < first:
            target[: first - start] = self.window(start, first)
        for offset in range(first, last, self._step):
            self._fill(offset, target[offset - start : min(offset + self._step, last) - start])
        if last < stop:
            target[last - start :] = self.window(last, stop)

    def window(self, start: int, stop: int, room: memoryview | None = None) -> memoryview:
        """Read bytes `start` to `stop`, at most `WINDOW_BYTES`, into the buffer `room`. None: the
        buffer of the previous call. The next call with the same buffer overwrites the result."""
        before = self._room
        self._room = before if room is None else room
        first, last = start, stop
        if self._checksums is not None:
            block = self._source.manifest.block_bytes
            first = start // block * block
            last = min(-(-stop // block) * block, self._span.nbytes)
        before_start, before_stop = self._in_room
        kept = min(before_stop, last) - first if before_start <= first < before_stop else 0
        shift = first - before_start
        if kept and (shift or self._room is not before):
            self._room[:kept] = before[shift : shift + kept]
        self._in_room = (0, 0)
        for offset in range(first + kept, last, self._step):
            self._fill(offset, self._room[offset - first : min(offset + self._step, last) - first])
        if self._checksums is not None:
            self._in_room = (first, last)
        return self._room[start - first : stop - first]

    def finish(self) -> None:
        """Check the CRC-32 of the chunk's data, if `with_crc32` was called. Call this after all
        data is read."""
        if self._crc32 and self._crc32[0] != self._crc32[1]:
            raise DamagedError(
                f"`{self._source.url}/{self._file}`: `{self.name}` has CRC-32 "
                f"{self._crc32[0]:08x}, its container says {self._crc32[1]:08x}",
                hint=self._source.hint,
                file=f"{self._source.url}/{self._file}",
                entry=self.name,
            )

    def _fill(self, start: int, target: memoryview) -> None:
        """Read from byte `start` until `target` is full, and check the data. If there are
        checksums, the data must be whole blocks."""
        offset = self._span.offset + start
        nbytes = self._reader.read_into(offset, target)
        if nbytes != len(target):
            raise ends_inside(self._source, self._file, self.name, offset + nbytes)
        self.num_read += nbytes
        if self._checksums is not None:
            first = start // self._source.manifest.block_bytes
            check(self._source, self._file, self.name, first, target, self._checksums)
        elif self._crc32:
            self._crc32 = (zlib.crc32(target, self._crc32[0]), self._crc32[1])


def check(
    source: Source, file: str, name: str, first: int, data: memoryview, checksums: Sequence[int]
) -> None:
    """Check `data`: consecutive blocks of a chunk of tensor `name`, beginning with the chunk's
    block `first`. `checksums`: of all blocks of the chunk. Raises a DamagedError if the checksum of
    a block differs."""
    block_bytes = source.manifest.block_bytes
    for number, start in enumerate(range(0, len(data), block_bytes), first):
        found = checksum(data[start : start + block_bytes])
        if found != checksums[number]:
            raise DamagedError(
                f"`{source.url}/{file}`: block {number} of `{name}` has checksum {found:016x}, "
                f"the manifest says {checksums[number]:016x}",
                hint=source.hint,
                file=f"{source.url}/{file}",
                entry=name,
                block=number,
            )


def ends_inside(source: Source, file: str, name: str, position: int) -> DamagedError:
    """Return the error for a file that ends inside a tensor."""
    return DamagedError(
        f"`{source.url}/{file}` ends inside `{name}`, at byte {position}",
        hint=source.hint,
        file=f"{source.url}/{file}",
        entry=name,
    )
