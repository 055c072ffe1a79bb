"""Chunks of tensors, and the rows that list them in `index.bin`.

The `manifest.json` of a small checkpoint lists the chunks itself. A job of 2,048 ranks and 2,000
tensors has four million chunks. A large checkpoint therefore lists them in `index.bin`, with one
row per chunk, and each rank reads only the blocks with the rows that it needs. docs/format.md
specifies both files.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

from holdfast.errors import DamagedError, FormatError
from holdfast.format import checksum
from holdfast.format.region import Region
from holdfast.format.sending import sent_by_fields
from holdfast.format.untrusted import check_file_name, count_of

BLOCK_BYTES = 4096
"""Bytes of `index.bin` under one checksum. Small, since a rank of a large job needs one row of each
tensor, and must read and check the whole block around each row."""

NUM_PLACES = 5
"""A row begins with this many numbers. The start and stop of the chunk's region follow."""

_NUMBER = struct.Struct("<Q")
_CHECKED_BYTES = 16 << 20
"""Bytes that `RowFile.check` reads at a time, a multiple of `BLOCK_BYTES`."""

_BATCH_ROWS = 256
"""Number of rows that an iteration over `ChunkRows` decodes at a time."""


class Span(NamedTuple):
    """Contiguous bytes of a file."""

    offset: int
    nbytes: int

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


class Chunk(NamedTuple):
    """A region of a tensor, stored contiguously."""

    region: Region
    file: str
    item: Span
    """Position of the archive around the data, which stock DCP passes to `torch.load`. In files of
    other formats, position of the data alone."""

    data_offset: int | None = None
    """Offset of the raw row-major elements in the file. None if the elements are not row-major, or
    if the archive must be read to find them."""

    first_block: int | None = None
    """Index, in the file's table, of the checksum of the chunk's first block. The checksums of the
    other blocks follow. None if the format has no block checksums."""


@sent_by_fields
@dataclass(frozen=True, slots=True)
class Table:
    """Table of a file's block checksums, from `offset` to the end of the file."""

    offset: int
    checksum: int
    """Checksum of the table itself."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file, as the manifest lists it."""

    name: str
    nbytes: int
    table: Table

    @property
    def num_blocks(self) -> int:
        return (self.nbytes - self.table.offset) // checksum.NBYTES


def data_file_of(stored: Sequence[Any], where: str) -> DataFile:
    """Decode and check a member of a manifest's `files`: name, size, and offset and checksum of the
    file's table.

    Raises:
        FormatError: the name is not a plain file name.
        ValueError: the member is invalid.
    """
    name, nbytes, offset, table_checksum = stored
    check_file_name(name, where)
    file = DataFile(name, count_of(nbytes), table_of(offset, table_checksum))
    if file.table.offset > file.nbytes or (file.nbytes - file.table.offset) % checksum.NBYTES:
        raise ValueError(f"`{name}`: no table of checksums from {offset} to {nbytes}")
    return file


def table_of(offset: object, stored: str) -> Table:
    """Decode and check a table's offset and checksum. Raises a ValueError if one is invalid."""
    (table_checksum,) = checksum.from_hex(stored)
    return Table(count_of(offset), table_checksum)


def item_of(number: int, offset: int, nbytes: int, files: Sequence[DataFile]) -> Span:
    """Return the position of a chunk's or value's item in `files[number]`. Raises a ValueError if
    the item reaches into the file's table."""
    item, file = Span(offset, nbytes), files[number]
    if item.stop > file.table.offset:
        raise ValueError(
            f"item {item} is outside of the {file.table.offset} bytes of `{file.name}`"
        )
    return item


class ChunkDecoder(NamedTuple):
    """Decodes a tensor's chunks, and checks them against the tensor's shape and the data files."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    files: Sequence[DataFile]
    block_bytes: int

    def decode(self, numbers: Sequence[int]) -> Chunk:
        """Decode the numbers of a chunk: index of its file, offset and bytes of its item, offset of
        its data, index of its first block, then start and stop along each dim.

        Raises:
            ValueError, LookupError: the numbers contradict the shape or the file.
        """
        name, dims = self.name, len(self.shape)
        number, offset, nbytes, data_offset, first_block, *corners = numbers
        if len(corners) != 2 * dims:
            raise ValueError(f"`{name}`: a chunk of {len(corners) // 2} dims, not {dims}")
        region = Region(tuple(corners[:dims]), tuple(corners[dims:]))
        item, file = item_of(number, offset, nbytes, self.files), self.files[number]
        data_bytes = region.num_elements * self.itemsize
        if not region.fits(self.shape):
            raise ValueError(f"`{name}`: chunk {region} is outside of the shape {self.shape}")
        if not item.offset <= data_offset <= data_offset + data_bytes <= item.stop:
            raise ValueError(f"`{name}`: data at {data_offset} is outside of its item {item}")
        if first_block + checksum.num_blocks(data_bytes, self.block_bytes) > file.num_blocks:
            raise ValueError(f"`{name}`: its checksums are outside of those of `{file.name}`")
        return Chunk(region, file.name, item, data_offset, first_block)


# ------------------------------------------------------------------------------------- `index.bin`


class RowFile:
    """`index.bin`: rows, then a table of the checksums of their blocks.

    Reads and checks only the blocks that are needed. A rank that has received a `RowFile` from
    another rank must call `connect` before it reads.
    """

    def __init__(self, nbytes: int, table: Table) -> None:
        self.nbytes: int = nbytes
        self.table: Table = table
        self.where: str = ""
        self._fetch: Callable[[int, int], bytes] | None = None
        self._unit_bytes = BLOCK_BYTES
        self._checksums: tuple[int, ...] | None = None
        self._window = 0, b""
        """Offset and content of the blocks that were read last."""

    def connect(self, fetch: Callable[[int, int], bytes], where: str, unit_bytes: int) -> None:
        """Use `fetch(start, stop)` for all further reads. Errors call the file `where`.

        `unit_bytes`: minimum number of bytes to fetch at a time, a multiple of `BLOCK_BYTES`.
        """
        self._fetch, self.where, self._unit_bytes = fetch, where, unit_bytes

    def __reduce__(self) -> tuple[type[RowFile], tuple[int, Table]]:
        # Leave out `_fetch` and the bytes that were read: each rank reads from its own store.
        return RowFile, (self.nbytes, self.table)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowFile):
            return NotImplemented
        return (self.nbytes, self.table) == (other.nbytes, other.table)

    def __hash__(self) -> int:
        return hash((self.nbytes, self.table))

    def read(self, start: int, stop: int) -> memoryview:
        """Read bytes `start` to `stop` of the rows.

        Raises:
            DamagedError: a block, or the table, does not match its checksum.
        """
        # Read `_window` only once, since another thread may replace it at any time.
        first, data = self._window
        if not first <= start <= stop <= first + len(data):
            unit = self._unit_bytes
            first = start // unit * unit
            last = max(first + unit, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
            data = self._checked(first, min(last, self.table.offset))
            self._window = (first, data)
        return memoryview(data)[start - first : stop - first]

    def check(self) -> None:
        """Read and check all rows.

        Raises:
            DamagedError: a block, or the table, does not match its checksum.
        """
        for first in range(0, self.table.offset, _CHECKED_BYTES):
            self._checked(first, min(first + _CHECKED_BYTES, self.table.offset))

    def check_table(self) -> tuple[int, ...]:
        """Return the checksums in the table. The first call reads and checks the table."""
        if self._checksums is None:
            packed = self._read(self.table.offset, self.nbytes)
            if checksum.checksum(packed) != self.table.checksum:
                raise self._damaged("its table of checksums does not match its checksum")
            self._checksums = checksum.unpack(packed)
        return self._checksums

    def _checked(self, first: int, stop: int) -> bytes:
        checksums = self.check_table()
        data = self._read(first, stop)
        found_sums = checksum.block_checksums(memoryview(data), BLOCK_BYTES)
        for block, found in enumerate(found_sums, first // BLOCK_BYTES):
            if found != checksums[block]:
                raise self._damaged(
                    f"block {block} has checksum {found:016x}, its table says "
                    f"{checksums[block]:016x}"
                )
        return data

    def _read(self, start: int, stop: int) -> bytes:
        assert self._fetch is not None, "`connect` was not called on this rank"
        data = self._fetch(start, stop)
        if len(data) != stop - start:
            raise self._damaged(f"it ends at byte {start + len(data)} of {self.nbytes}")
        return data

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(
            f"`{self.where}`: {what}",
            hint=f"`holdfast verify {self.where.rpartition('/')[0]}` lists what is damaged",
            file=self.where,
        )


def row_file_of(stored: Sequence[Any]) -> RowFile:
    """Decode and check the member `index` of a manifest: size of `index.bin`, and offset and
    checksum of its table. Raises a ValueError if the member is invalid."""
    nbytes, offset, table_checksum = stored
    table = table_of(offset, table_checksum)
    num_blocks = checksum.num_blocks(table.offset, BLOCK_BYTES)
    if count_of(nbytes) - table.offset != num_blocks * checksum.NBYTES:
        raise ValueError(f"no table of checksums from {offset} to {nbytes}")
    return RowFile(nbytes, table)


@sent_by_fields
@dataclass(frozen=True, slots=True, eq=False)
class ChunkRows(Sequence[Chunk]):
    """Chunks of a tensor whose rows are in `index.bin`. A row is read when its chunk is needed.

    Reading a row raises a DamagedError if its block is damaged, and a FormatError if the row
    contradicts the manifest.
    """

    file: RowFile
    offset: int
    """Offset of the first row in the file."""

    num_rows: int
    longest: tuple[int, ...]
    """Length of the longest chunk along each dim."""

    decoder: ChunkDecoder

    @property
    def _row_bytes(self) -> int:
        return _NUMBER.size * (NUM_PLACES + 2 * len(self.longest))

    def __len__(self) -> int:
        return self.num_rows

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChunkRows):
            return NotImplemented
        place = self.file, self.offset, self.num_rows, self.longest
        return place == (other.file, other.offset, other.num_rows, other.longest)

    def __hash__(self) -> int:
        return hash((self.offset, self.num_rows))

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | Sequence[Chunk]:
        numbers = range(self.num_rows)[index]
        if isinstance(numbers, int):
            return self._decoded(numbers, numbers + 1)[0]
        return [self._decoded(number, number + 1)[0] for number in numbers]

    def __iter__(self) -> Iterator[Chunk]:
        for first in range(0, self.num_rows, _BATCH_ROWS):
            yield from self._decoded(first, min(first + _BATCH_ROWS, self.num_rows))

    def overlapping(self, region: Region) -> list[Chunk]:
        """Return the chunks that hold elements of `region`. Reads only a few rows of other
        chunks."""
        if not region.num_elements:
            return []
        first, stop = 0, self.num_rows
        for dim, (start, end) in enumerate(zip(region.start, region.stop, strict=True)):
            # A chunk that begins at `before` or earlier cannot reach into the region.
            before = start - self.longest[dim]
            length = self.decoder.shape[dim]
            guess = first + (before + 1) * (stop - first) // length
            if before >= 0:
                first = self._first_after(before, dim, first, stop, guess)
            if end < length:
                stop = self._first_after(end - 1, dim, first, stop, first + 1)
            if stop - first < 2 or self._start(first, dim) != self._start(stop - 1, dim):
                # Only rows with equal starts along this dim are sorted along the next dim.
                break
        chunks = self._decoded(first, stop)
        return [chunk for chunk in chunks if (chunk.region & region).num_elements]

    def _first_after(self, value: int, dim: int, first: int, stop: int, guess: int) -> int:
        """Return the index of the first row, from `first` to `stop`, whose chunk begins after
        index `value` along `dim`. Return `stop` if there is no such row.

        Looks around row `guess` at growing distances, then bisects. If the chunks have equal sizes,
        it reads two rows of one block, where a plain bisection would read many blocks.
        """
        low, high, distance, probe = first, stop, 1, guess
        while low < high:
            if not low <= probe < high:
                probe = (low + high) // 2
            if self._start(probe, dim) > value:
                high, probe = probe, probe - distance
            else:
                low, probe = probe + 1, probe + distance
            distance *= 2
        return low

    def _start(self, row: int, dim: int) -> int:
        position = self.offset + row * self._row_bytes + _NUMBER.size * (NUM_PLACES + dim)
        number: int = _NUMBER.unpack(self.file.read(position, position + _NUMBER.size))[0]
        return number

    def _decoded(self, first: int, stop: int) -> list[Chunk]:
        row_bytes = self._row_bytes
        data = self.file.read(self.offset + first * row_bytes, self.offset + stop * row_bytes)
        row_format = f"<{row_bytes // _NUMBER.size}Q"
        try:
            # Not `iter_unpack`: Python 3.11 crashes once it collects the traceback of an error with
            # the iterator.
            return [
                self.decoder.decode(struct.unpack_from(row_format, data, position))
                for position in range(0, len(data), row_bytes)
            ]
        except (ValueError, LookupError) as error:
            raise FormatError(f"`{self.file.where}` contradicts the manifest: {error}") from error


def rows_of(stored: Sequence[Any], file: RowFile, decoder: ChunkDecoder) -> ChunkRows:
    """Decode and check the member `rows` of a tensor's entry: offset of the first row, number of
    rows, then length of the longest chunk along each dim. Raises a ValueError if it is invalid."""
    offset, count, *longest = map(count_of, stored)
    rows = ChunkRows(file, offset, count, tuple(longest), decoder)
    if len(longest) != len(decoder.shape):
        raise ValueError(f"`{decoder.name}`: rows of {len(longest)} dims, not {len(decoder.shape)}")
    row_bytes = _NUMBER.size * (NUM_PLACES + 2 * len(longest))
    if offset % _NUMBER.size or offset + count * row_bytes > file.table.offset:
        raise ValueError(f"`{decoder.name}`: its rows are outside of the rows of the index")
    return rows
