"""A checkpoint that is open for reading, and the data of its chunks: ranges, each block checked."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from holdfast.catalog.catalog import place, read_checksums, verify_hint
from holdfast.catalog.steady import is_deleted
from holdfast.errors import DamagedError, HoldfastError, NotFoundError
from holdfast.format.checksum import BLOCK_BYTES_MAX, block_checksums, checksum, num_blocks
from holdfast.format.manifest import Chunk, Manifest, Span, ValueEntry
from holdfast.storage.store import Reader, ReadStore

WINDOW_BYTES = 2 << 20
"""Most bytes of a chunk that are asked for at once, but for those that go straight to their place.
Whole blocks, few enough to be in cache from their checksum when they are taken on from there."""

ROOM_BYTES = WINDOW_BYTES + 2 * BLOCK_BYTES_MAX
"""Held beside the target, a thread: a window, and the rest of the blocks at its ends."""

CHECKED_BYTES = BLOCK_BYTES_MAX
"""Read at once, of what is checked: whole blocks, few enough to be in cache from the read."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that is open for reading."""

    store: ReadStore
    folder: str
    manifest: Manifest
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    """Checksums of the files that have been read from."""

    @property
    def url(self) -> str:
        return place(self.store, self.folder)

    @property
    def hint(self) -> str:
        """Next step where this checkpoint is damaged."""
        return verify_hint(self.url)

    def key(self, file: str) -> str:
        return f"{self.folder}/{file}"

    def checksums(self, chunk: Chunk, nbytes: int) -> tuple[int, ...] | None:
        """Of the blocks of a chunk of so many bytes; None where none were kept."""
        if chunk.first_block is None:
            return None
        if chunk.file not in self.tables:
            # Two threads may both read it: that costs less than making one wait.
            try:
                self.tables[chunk.file] = read_checksums(
                    self.store, self.folder, self.manifest, chunk.file
                )
            except NotFoundError as error:
                raise lacks(self, chunk.file) from error
        stop = chunk.first_block + num_blocks(nbytes, self.manifest.block_bytes)
        return self.tables[chunk.file][chunk.first_block : stop]


def lacks(source: Source, file: str) -> HoldfastError:
    """The error on a file that is not there: damage, unless the whole checkpoint is gone."""
    if is_deleted(source.store, source.folder):
        return NotFoundError(f"`{source.url}` has been deleted meanwhile")
    return DamagedError(f"`{source.url}/{file}` is missing", hint=source.hint)


def read_value(source: Source, name: str, entry: ValueEntry) -> bytes:
    """The container of a value, checked where the checkpoint has a checksum of it."""
    try:
        data = source.store.read(source.key(entry.file), entry.item.offset, entry.item.stop)
    except NotFoundError as error:
        raise lacks(source, entry.file) from error
    if len(data) != entry.item.nbytes:
        raise DamagedError(
            f"`{source.url}/{entry.file}` ends inside value `{name}`", hint=source.hint
        )
    if entry.checksum is not None and checksum(data) != entry.checksum:
        raise DamagedError(
            f"`{source.url}/{entry.file}`: value `{name}` has checksum {checksum(data):016x}, "
            f"the manifest says {entry.checksum:016x}",
            hint=source.hint,
        )
    return data


class ChunkData:
    """The raw data of one chunk, read by ranges, every block that a range touches checked: once,
    where ranges follow each other."""

    def __init__(
        self,
        source: Source,
        name: str,
        place: tuple[str, Span],
        checksums: Sequence[int] | None,
        reader: Reader,
        room: memoryview,
    ) -> None:
        """`place`: the chunk's file, which `reader` reads, and where in it the raw data is. `room`:
        `ROOM_BYTES` of memory to use."""
        self.name = name
        self._source, (self._file, self._span) = source, place
        self._checksums, self._reader, self._room = checksums, reader, room
        self._held = (0, 0)
        self._crc32: tuple[int, int] | None = None
        self.num_read: int = 0
        """Bytes read so far."""

    def with_crc32(self, expected: int) -> ChunkData:
        """Check the CRC-32 that `torch.save` left, of the data read whole and in order."""
        self._crc32 = (0, expected)
        return self

    def read(self, start: int, stop: int, target: memoryview) -> None:
        """Fill `target` with bytes `start` to `stop`."""
        if self._checksums is None:
            self._fill(start, target)
            return
        # Whole blocks go straight to their place, those at the ends by way of the room.
        whole = self._source.manifest.block_bytes
        first = min(-(-start // whole) * whole, stop)
        last = stop if stop == self._span.nbytes else max(first, stop // whole * whole)
        if start < first:
            target[: first - start] = self.window(start, first)
        for at in range(first, last, CHECKED_BYTES):
            self._fill(at, target[at - start : min(at + CHECKED_BYTES, last) - start])
        if last < stop:
            target[last - start :] = self.window(last, stop)

    def window(self, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop`, at most `WINDOW_BYTES`, good until the next call."""
        first, last = start, stop
        if self._checksums is not None:
            whole = self._source.manifest.block_bytes
            first = start // whole * whole
            last = min(-(-stop // whole) * whole, self._span.nbytes)
        lo, hi = self._held
        kept = min(hi, last) - first if lo <= first < hi else 0
        if kept and lo < first:
            self._room[:kept] = self._room[first - lo : first - lo + kept]
        self._held = (0, 0)
        for at in range(first + kept, last, CHECKED_BYTES):
            self._fill(at, self._room[at - first : min(at + CHECKED_BYTES, last) - first])
        if self._checksums is not None:
            self._held = (first, last)
        return self._room[start - first : stop - first]

    def finish(self) -> None:
        """All has been read."""
        if self._crc32 and self._crc32[0] != self._crc32[1]:
            raise DamagedError(
                f"`{self._source.url}/{self._file}`: `{self.name}` has CRC-32 "
                f"{self._crc32[0]:08x}, its container says {self._crc32[1]:08x}",
                hint=self._source.hint,
            )

    def _fill(self, start: int, target: memoryview) -> None:
        """Bytes from `start` on, checked: whole blocks, or any where no checksums were kept."""
        done = self._reader.read_into(self._span.offset + start, target)
        if done != len(target):
            raise ends_inside(self._source, self._file, self.name, self._span.offset + start + done)
        self.num_read += done
        if self._checksums is not None:
            whole = self._source.manifest.block_bytes
            first = start // whole
            expected = self._checksums[first : first + num_blocks(done, whole)]
            check(self._source, self._file, self.name, first, target, expected)
        elif self._crc32:
            self._crc32 = (zlib.crc32(target, self._crc32[0]), self._crc32[1])


def check(
    source: Source, file: str, name: str, first: int, data: memoryview, expected: Sequence[int]
) -> None:
    """Refuse blocks of a tensor, from number `first` on, that are not what was written."""
    found = block_checksums(data, source.manifest.block_bytes)
    if found == [*expected]:
        return
    n = next(n for n, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
    raise DamagedError(
        f"`{source.url}/{file}`: block {first + n} of `{name}` has checksum {found[n]:016x}, "
        f"the manifest says {expected[n]:016x}",
        hint=source.hint,
    )


def ends_inside(source: Source, file: str, name: str, position: int) -> DamagedError:
    """What is said of a file that is too short."""
    return DamagedError(
        f"`{source.url}/{file}` ends inside `{name}`, at byte {position}", hint=source.hint
    )
