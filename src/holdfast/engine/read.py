"""Bytes of a checkpoint into tensors: only the ranges that are wanted, each block checked."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

import torch

from holdfast.catalog.catalog import place, read_checksums
from holdfast.engine.reshard import Part, moves, parts
from holdfast.errors import DamagedError
from holdfast.format.checksum import BLOCK_BYTES, checksum, num_blocks
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry, ValueEntry
from holdfast.format.region import Region
from holdfast.format.torchzip import contiguous_strides, locate
from holdfast.state.shard import Piece
from holdfast.storage.store import ReadStore

WINDOW_BYTES = 8 << 20
"""Bytes held beside the target, a thread. Whole blocks."""

THREADS_MAX = 4

_HINT = "leave out `load_step` to resume from the newest good step"


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


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A tensor to fill: where its pieces lie in the stored one, and the memory that they go to."""

    name: str
    pieces: Sequence[Piece]
    local: torch.Tensor


def read_tensors(source: Source, wanted: Sequence[Wanted]) -> int:
    """Fill every wanted tensor. Returns the bytes read.

    Files are read in the order of their bytes, by a few threads; the first error ends them all.

    Raises:
        DamagedError: bytes that are not those that were written, or not there.
    """
    jobs: list[tuple[str, int, Callable[[], int]]] = []
    for want in wanted:
        entry = source.manifest.tensors[want.name]
        for piece in want.pieces:
            for move in moves(want.name, entry, piece.region):
                at = piece.local_of(move.region)
                target = want.local[at.slices()] if want.local.ndim else want.local
                work = partial(
                    _read_move, source, want.name, entry, move.chunk, move.region, target
                )
                jobs.append((move.chunk.file, move.chunk.item.offset, work))
    jobs.sort(key=lambda job: job[:2])
    return sum(_run([work for _, _, work in jobs]))


def _run(jobs: Sequence[Callable[[], int]]) -> list[int]:
    threads = min(THREADS_MAX, os.cpu_count() or 1, len(jobs))
    if threads < 2:
        return [job() for job in jobs]
    with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-read") as pool:
        futures = [pool.submit(job) for job in jobs]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        return [future.result() for future in futures if future in done]


def read_value(source: Source, name: str, entry: ValueEntry) -> bytes:
    """The container of a value, checked where the checkpoint has a checksum of it."""
    data = source.store.read(source.key(entry.file), entry.item.offset, entry.item.stop)
    if len(data) != entry.item.nbytes:
        raise DamagedError(f"`{source.url}/{entry.file}` ends inside value `{name}`", hint=_HINT)
    if entry.checksum is not None and checksum(data) != entry.checksum:
        raise DamagedError(
            f"`{source.url}/{entry.file}`: value `{name}` has checksum {checksum(data):016x}, "
            f"the manifest says {entry.checksum:016x}",
            hint=_HINT,
        )
    return data


def _read_move(
    source: Source,
    name: str,
    entry: TensorEntry,
    chunk: Chunk,
    region: Region,
    target: torch.Tensor,
) -> int:
    """Bring one region of one chunk into `target`, which has its shape."""
    itemsize = dtype_of(entry.dtype).itemsize
    nbytes = chunk.region.num_elements * itemsize
    dtype: torch.dtype = getattr(torch, entry.dtype)
    box = region.within(chunk.region)
    shape, strides = chunk.region.shape, contiguous_strides(chunk.region.shape)
    offset, crc32 = chunk.data_offset, 0
    if offset is None:
        stored = locate(
            partial(_fetch, source, chunk.file), chunk.item, where=f"{chunk.file}:{name}"
        )
        if (stored.dtype, stored.shape) != (entry.dtype, shape):
            raise DamagedError(
                f"`{source.url}/{chunk.file}`: `{name}` is {stored.dtype} {list(stored.shape)} in "
                f"its file, {entry.dtype} {list(shape)} in the index",
                hint=_HINT,
            )
        offset, crc32 = stored.data.offset, stored.crc32
        if stored.strides != strides and nbytes > itemsize:
            # As a transposed parameter is kept. Rare: read the chunk whole, then pick.
            whole = torch.empty(stored.data.nbytes // itemsize, dtype=dtype)
            data = ChunkData(source, name, chunk.file, Span(offset, whole.nbytes), None)
            if crc32:
                data = data.with_crc32(crc32)
            data.read(0, whole.nbytes, _memory(whole))
            data.finish()
            target.copy_(whole.as_strided(shape, stored.strides)[box.slices()])
            return whole.nbytes
    checksums = source.checksums(chunk, nbytes)
    data = ChunkData(source, name, chunk.file, Span(offset, nbytes), checksums)
    if crc32 and box == Region.whole(shape):
        data = data.with_crc32(crc32)
    done = 0
    for part in parts(box, shape, itemsize, WINDOW_BYTES):
        done += _read_part(data, part, dtype, strides, target)
    data.finish()
    return done


def _read_part(
    data: ChunkData, part: Part, dtype: torch.dtype, strides: tuple[int, ...], target: torch.Tensor
) -> int:
    into = target[part.box.slices()] if target.ndim else target
    plain = into.is_cpu and into.is_contiguous() and not (into.is_conj() or into.is_neg())
    if part.contiguous and plain and into.dtype == dtype:
        return data.read(part.start, part.stop, _memory(into))
    if part.contiguous and part.stop - part.start > WINDOW_BYTES and part.box.shape:
        return sum(
            _read_part(data, piece, dtype, strides, target)
            for piece in _windows(part, dtype.itemsize)
        )
    staged = torch.empty((part.stop - part.start) // dtype.itemsize, dtype=dtype)
    done = data.read(part.start, part.stop, _memory(staged))
    shape = part.box.shape
    into.copy_(staged.view(shape) if part.contiguous else staged.as_strided(shape, strides))
    return done


def _windows(part: Part, itemsize: int) -> Iterator[Part]:
    """A long contiguous part in pieces that fit beside the target: rows of its first long dim."""
    box = part.box
    dim = next(d for d, size in enumerate(box.shape) if size > 1)
    row = box.num_elements // box.shape[dim] * itemsize
    rows = max(1, WINDOW_BYTES // row)
    for first in range(0, box.shape[dim], rows):
        last = min(first + rows, box.shape[dim])
        start, stop = list(box.start), list(box.stop)
        start[dim], stop[dim] = box.start[dim] + first, box.start[dim] + last
        piece = Region(tuple(start), tuple(stop))
        yield Part(part.start + first * row, part.start + last * row, piece, True)


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
                hint=_HINT,
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
                    hint=_HINT,
                )

    def _fill(self, start: int, target: memoryview) -> None:
        key = self._source.key(self._file)
        done = self._source.store.read_into(key, self._span.offset + start, target)
        if done != len(target):
            raise DamagedError(
                f"`{self._source.url}/{self._file}` ends inside `{self._name}`, at byte "
                f"{self._span.offset + start + done}",
                hint=_HINT,
            )


def _cuts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """`start` to `stop` in windows that begin and end with a block, but for the two ends."""
    while start < stop:
        whole = start % BLOCK_BYTES == 0 and stop - start >= BLOCK_BYTES
        size = min(WINDOW_BYTES, (stop - start) // BLOCK_BYTES * BLOCK_BYTES) if whole else 0
        end = start + size if size else min(stop, (start // BLOCK_BYTES + 1) * BLOCK_BYTES)
        yield start, end
        start = end


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to write into."""
    # Not `view(-1)`: a single element counts as contiguous whatever its stride.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _fetch(source: Source, file: str, offset: int, nbytes: int) -> bytes:
    return source.store.read(source.key(file), offset, offset + nbytes)
