"""A checkpoint that is open for reading, and the data of its chunks: ranges, each block checked."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from holdfast.catalog.catalog import place, read_checksums
from holdfast.errors import DamagedError
from holdfast.format.checksum import BLOCK_BYTES, checksum, num_blocks
from holdfast.format.manifest import Chunk, Manifest, Span, ValueEntry
from holdfast.storage.store import ReadStore

WINDOW_BYTES = 8 << 20
"""Bytes held beside the target, a thread. Whole blocks."""

HINT = "leave out `load_step` to resume from the newest good step"


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

    def key(self, file: str) -> str:
        return f"{self.folder}/{file}"

    def checksums(self, chunk: Chunk, nbytes: int) -> tuple[int, ...] | None:
        """Of the blocks of a chunk of so many bytes; None where none were kept."""
        if chunk.first_block is None:
            return None
        if chunk.file not in self.tables:
            # Two threads may both read it: that costs less than making one wait.
            self.tables[chunk.file] = read_checksums(
                self.store, self.folder, self.manifest, chunk.file
            )
        stop = chunk.first_block + num_blocks(nbytes)
        return self.tables[chunk.file][chunk.first_block : stop]


def read_value(source: Source, name: str, entry: ValueEntry) -> bytes:
    """The container of a value, checked where the checkpoint has a checksum of it."""
    data = source.store.read(source.key(entry.file), entry.item.offset, entry.item.stop)
    if len(data) != entry.item.nbytes:
        raise DamagedError(f"`{source.url}/{entry.file}` ends inside value `{name}`", hint=HINT)
    if entry.checksum is not None and checksum(data) != entry.checksum:
        raise DamagedError(
            f"`{source.url}/{entry.file}`: value `{name}` has checksum {checksum(data):016x}, "
            f"the manifest says {entry.checksum:016x}",
            hint=HINT,
        )
    return data


class ChunkData:
    """The raw data of one chunk, read by ranges, every block that a range touches checked."""

    def __init__(
        self, source: Source, name: str, file: str, span: Span, checksums: Sequence[int] | None
    ) -> None:
        self._source, self._name, self._file, self._span = source, name, file, span
        self._checksums = checksums
        self._crc32: tuple[int, int] | None = None

    def with_crc32(self, expected: int) -> ChunkData:
        """Check the CRC-32 that `torch.save` left, of the data read whole and in order."""
        self._crc32 = (0, expected)
        return self

    def read(self, start: int, stop: int, target: memoryview) -> int:
        """Fill `target` with bytes `start` to `stop`. Returns how many bytes were read."""
        if self._checksums is None:
            self._fill(start, target)
            if self._crc32:
                self._crc32 = (zlib.crc32(target, self._crc32[0]), self._crc32[1])
            return len(target)
        done = 0
        for lo, hi in _cuts(start, stop):
            first = lo // BLOCK_BYTES * BLOCK_BYTES
            last = min(-(-hi // BLOCK_BYTES) * BLOCK_BYTES, self._span.nbytes)
            if (first, last) == (lo, hi):
                self._fill_checked(lo, target[lo - start : hi - start])
            else:
                block = memoryview(bytearray(last - first))
                self._fill_checked(first, block)
                target[lo - start : hi - start] = block[lo - first : hi - first]
            done += last - first
        return done

    def finish(self) -> None:
        """All has been read."""
        if self._crc32 and self._crc32[0] != self._crc32[1]:
            raise DamagedError(
                f"`{self._source.url}/{self._file}`: `{self._name}` has CRC-32 "
                f"{self._crc32[0]:08x}, its container says {self._crc32[1]:08x}",
                hint=HINT,
            )

    def _fill_checked(self, start: int, target: memoryview) -> None:
        assert self._checksums is not None
        self._fill(start, target)
        for at in range(0, len(target), BLOCK_BYTES):
            index = (start + at) // BLOCK_BYTES
            found = checksum(target[at : at + BLOCK_BYTES])
            if found != self._checksums[index]:
                raise DamagedError(
                    f"`{self._source.url}/{self._file}`: block {index} of `{self._name}` has "
                    f"checksum {found:016x}, the manifest says {self._checksums[index]:016x}",
                    hint=HINT,
                )

    def _fill(self, start: int, target: memoryview) -> None:
        key = self._source.key(self._file)
        done = self._source.store.read_into(key, self._span.offset + start, target)
        if done != len(target):
            raise DamagedError(
                f"`{self._source.url}/{self._file}` ends inside `{self._name}`, at byte "
                f"{self._span.offset + start + done}",
                hint=HINT,
            )


def _cuts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """`start` to `stop` in windows that begin and end with a block, but for the two ends."""
    while start < stop:
        whole = start % BLOCK_BYTES == 0 and stop - start >= BLOCK_BYTES
        size = min(WINDOW_BYTES, (stop - start) // BLOCK_BYTES * BLOCK_BYTES) if whole else 0
        end = start + size if size else min(stop, (start // BLOCK_BYTES + 1) * BLOCK_BYTES)
        yield start, end
        start = end
