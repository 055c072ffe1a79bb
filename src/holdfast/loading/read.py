"""Read tensors of a checkpoint: only the wanted byte ranges, each block checked."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from holdfast.catalog.source import (
    ROOM_BYTES,
    WINDOW_BYTES,
    ChunkData,
    Source,
    check,
    ends_inside,
)
from holdfast.errors import DamagedError
from holdfast.format.manifest import Chunk, Span, TensorEntry
from holdfast.format.region import Region
from holdfast.format.torchzip import contiguous_strides, locate
from holdfast.loading.fit import put
from holdfast.planning.divide import aligned, divide, grouped
from holdfast.planning.gc_pause import gc_paused
from holdfast.planning.read_plan import ByteRange, byte_ranges, read_items
from holdfast.state.layout import bytes_of
from holdfast.state.shard import Piece
from holdfast.storage.store import Reader

THREADS_MAX = 4

JOB_BYTES = 32 << 20
"""Approximate size of one job of a thread, a multiple of a block. Two jobs on one chunk may both
read the block between them."""

SMALL_BYTES = 128 << 10
"""Size up to which chunks that lie close to each other are read together: one more copy costs less
than one more read call."""

GAP_BYTES_MAX = 16 << 10
"""Largest gap between small chunks that are read together: more than the frames of two items."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A tensor to fill: pieces of a stored tensor, and the memory that they go to."""

    name: str
    pieces: Sequence[Piece]
    local: torch.Tensor


def read_tensors(source: Source, wanted: Sequence[Wanted], threads: int | None = None) -> int:
    """Fill every wanted tensor. Returns the bytes read.

    Files are read in the order of their bytes, by `threads` threads; None for as many as a process
    alone on its host uses. The first error stops all threads.

    Raises:
        DamagedError: bytes are missing, or are not the bytes that were written.
    """
    return _run(source, _jobs(source, wanted), threads or threads_for(1))


def threads_for(num_local: int) -> int:
    """Number of reading threads per rank, for `num_local` ranks on this host.

    All ranks together use no more threads than the host has cores: more would evict each other's
    blocks from the CPU cache before they are checked.
    """
    cores = len(os.sched_getaffinity(0))
    return min(THREADS_MAX, max(2 if num_local == 1 else 1, cores // num_local))


@gc_paused()
def _jobs(source: Source, wanted: Sequence[Wanted]) -> list[_Job]:
    """All jobs of a read, in the order of their bytes."""
    jobs: list[_Job] = []
    small: list[_SmallRead] = []
    for want in wanted:
        entry = source.manifest.tensors[want.name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        for piece in want.pieces:
            for item in read_items(want.name, entry, piece.region):
                target = within(want.local, piece.local_of(item.region))
                chunk, region = item.chunk, item.region
                nbytes = chunk.region.num_elements * dtype.itemsize
                if chunk.data_offset is None:
                    jobs.append(_ContainerJob(want.name, entry, chunk, region, target))
                elif nbytes <= SMALL_BYTES and chunk.first_block is not None:
                    start = chunk.data_offset
                    small.append(_SmallRead(start, nbytes, want.name, dtype, chunk, region, target))
                else:
                    jobs += _chunk_jobs(want.name, dtype, chunk, region, target)
    jobs += _batch_jobs(small)
    jobs.sort(key=lambda job: (job.chunk.file, job.start))
    return jobs


def within(tensor: torch.Tensor, box: Region) -> torch.Tensor:
    """View of a box of `tensor`."""
    if not tensor.ndim or (not any(box.start) and box.stop == tuple(tensor.shape)):
        return tensor
    return tensor[box.slices()]


# ------------------------------------------------------------------------------------------ threads


def _run(source: Source, jobs: Sequence[_Job], threads: int) -> int:
    """Run all jobs in threads, this one included. Returns the bytes read."""
    queue = _Queue(jobs)
    others = [
        threading.Thread(target=queue.work, args=(source,), name="holdfast-read", daemon=True)
        for _ in range(min(threads, len(jobs)) - 1)
    ]
    for thread in others:
        thread.start()
    if jobs:
        queue.work(source)
    for thread in others:
        thread.join()
    if queue.errors:
        raise queue.errors[0]
    return queue.num_read


class _Job(Protocol):
    """Unit of work of a thread."""

    @property
    def chunk(self) -> Chunk:
        """Chunk whose file is read."""
        ...

    @property
    def start(self) -> int:
        """Approximate offset in the file."""
        ...

    def run(self, worker: _Worker) -> int:
        """Returns the bytes read."""
        ...


class _Queue:
    """Jobs for several threads. Each is handed out once; after an error none is."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self._jobs = iter(jobs)
        self._mutex = threading.Lock()
        self.errors: list[BaseException] = []
        self.num_read = 0

    def __iter__(self) -> Iterator[_Job]:
        return self

    def __next__(self) -> _Job:
        with self._mutex:
            if self.errors:
                raise StopIteration
            return next(self._jobs)

    def work(self, source: Source) -> None:
        try:
            num_read = _Worker(source).run(self)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for this one
            self.errors.append(error)
            return
        with self._mutex:
            self.num_read += num_read


class _Worker:
    """State of one thread: its open file, and a buffer for bytes that cannot be read straight into
    the target. The buffer is page-locked if there is a GPU to copy it to."""

    def __init__(self, source: Source) -> None:
        self.source = source
        pinned = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.memory = torch.empty(ROOM_BYTES, dtype=torch.uint8, pin_memory=pinned, device="cpu")
        self.room = self.memory.numpy().data
        self._file: str | None = None
        self._open = ExitStack()

    def run(self, jobs: Iterator[_Job]) -> int:
        """Run jobs until none is left. Returns the bytes read."""
        with self._open:
            return sum(job.run(self) for job in jobs)

    def reader(self, file: str) -> Reader:
        """Reader of a file. The file that was open before is closed."""
        if file != self._file:
            self._open.close()
            self._reader = self._open.enter_context(self.source.store.open(self.source.key(file)))
            self._file = file
        return self._reader

    def data(
        self, name: str, chunk: Chunk, span: Span, checksums: Sequence[int] | None
    ) -> ChunkData:
        place = chunk.file, span
        return ChunkData(self.source, name, place, checksums, self.reader(chunk.file), self.room)


# ------------------------------------------------------------------------------------- large chunks


@dataclass(frozen=True, slots=True)
class _Slice:
    """Bytes `start` to `stop` of a byte range, read by one call."""

    range: ByteRange
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class _ChunkJob:
    """Consecutive slices of one chunk."""

    name: str
    dtype: torch.dtype
    chunk: Chunk
    slices: Sequence[_Slice]
    target: torch.Tensor

    @property
    def start(self) -> int:
        return self.chunk.item.offset + self.slices[0].start

    def run(self, worker: _Worker) -> int:
        assert self.chunk.data_offset is not None
        span = Span(self.chunk.data_offset, self.chunk.region.num_elements * self.dtype.itemsize)
        checksums = worker.source.checksums(self.chunk, span.nbytes)
        data = worker.data(self.name, self.chunk, span, checksums)
        for part in self.slices:
            _read_slice(data, part, self.dtype, self.chunk.region.shape, self.target)
        return data.num_read


def _chunk_jobs(
    name: str, dtype: torch.dtype, chunk: Chunk, region: Region, target: torch.Tensor
) -> Iterator[_ChunkJob]:
    slices = _slices(region.within(chunk.region), chunk.region.shape, dtype, target)
    for group in grouped(slices, lambda part: part.stop - part.start, JOB_BYTES):
        yield _ChunkJob(name, dtype, chunk, group, target)


def _slices(
    box: Region, shape: tuple[int, ...], dtype: torch.dtype, target: torch.Tensor
) -> Iterator[_Slice]:
    """Slices of a chunk that hold `box`: up to `JOB_BYTES` if they are read straight into the
    target, otherwise up to `WINDOW_BYTES`."""
    for whole in byte_ranges(box, shape, dtype.itemsize, WINDOW_BYTES):
        if _is_direct(whole, dtype, within(target, whole.box)):
            for start, stop in aligned(whole.start, whole.stop, JOB_BYTES):
                yield _Slice(whole, start, stop)
        elif whole.stop - whole.start <= WINDOW_BYTES:
            yield _Slice(whole, whole.start, whole.stop)
        else:
            # Longer than a window only if contiguous.
            start = whole.start
            for rows in divide(whole.box, WINDOW_BYTES // dtype.itemsize):
                stop = start + rows.num_elements * dtype.itemsize
                yield _Slice(ByteRange(start, stop, rows, contiguous=True), start, stop)
                start = stop


def _is_direct(stored: ByteRange, dtype: torch.dtype, target: torch.Tensor) -> bool:
    """Whether the bytes can be read straight into `target`."""
    plain = target.is_cpu and target.is_contiguous() and not (target.is_conj() or target.is_neg())
    return stored.contiguous and plain and target.dtype == dtype


def _read_slice(
    data: ChunkData,
    part: _Slice,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    target: torch.Tensor,
) -> None:
    """Read one slice into its place in `target`."""
    stored = part.range
    box = within(target, stored.box)
    if _is_direct(stored, dtype, box):
        memory = bytes_of(box)[part.start - stored.start : part.stop - stored.start]
        data.read(part.start, part.stop, memory)
        return
    elements = torch.frombuffer(data.window(stored.start, stored.stop), dtype=dtype)
    strides = contiguous_strides(stored.box.shape if stored.contiguous else shape)
    put(box, elements.as_strided(stored.box.shape, strides), data.name)


# ------------------------------------------------------------------------------------- small chunks


@dataclass(frozen=True, slots=True, eq=False)
class _SmallRead:
    """A chunk of one block, and the wanted region of it."""

    start: int
    nbytes: int
    name: str
    dtype: torch.dtype
    chunk: Chunk
    region: Region
    target: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _BatchJob:
    """Small chunks that lie close to each other in one file, in file order."""

    reads: Sequence[_SmallRead]

    @property
    def chunk(self) -> Chunk:
        return self.reads[0].chunk

    @property
    def start(self) -> int:
        return self.reads[0].start

    def run(self, worker: _Worker) -> int:
        start, stop = self.start, max(read.start + read.nbytes for read in self.reads)
        file, source = self.chunk.file, worker.source
        num_read = worker.reader(file).read_into(start, worker.room[: stop - start])
        for read in self.reads:
            offset = read.start - start
            if offset + read.nbytes > num_read:
                raise ends_inside(source, file, read.name, start + num_read)
            checksums = source.checksums(read.chunk, read.nbytes)
            if checksums is not None:
                data = worker.room[offset : offset + read.nbytes]
                check(source, file, read.name, 0, data, checksums)
            count = read.nbytes // read.dtype.itemsize
            elements = torch.frombuffer(worker.room, dtype=read.dtype, count=count, offset=offset)
            box = read.region.within(read.chunk.region)
            put(read.target, within(elements.view(read.chunk.region.shape), box), read.name)
        return num_read


def _batch_jobs(small: list[_SmallRead]) -> Iterator[_BatchJob]:
    small.sort(key=lambda read: (read.chunk.file, read.start))
    batch: list[_SmallRead] = []
    stop = 0
    for read in small:
        if batch and (
            read.chunk.file != batch[0].chunk.file
            or read.start > stop + GAP_BYTES_MAX
            or read.start + read.nbytes > batch[0].start + WINDOW_BYTES
        ):
            yield _BatchJob(batch)
            batch, stop = [], 0
        batch.append(read)
        stop = max(stop, read.start + read.nbytes)
    if batch:
        yield _BatchJob(batch)


# ------------------------------------------------------------------- chunks without a known offset


@dataclass(frozen=True, slots=True, eq=False)
class _ContainerJob:
    """A region of a chunk, of a file of another program, whose data offset and strides only its
    container tells."""

    name: str
    entry: TensorEntry
    chunk: Chunk
    region: Region
    target: torch.Tensor

    @property
    def start(self) -> int:
        return self.chunk.item.offset

    def run(self, worker: _Worker) -> int:
        chunk, entry, source = self.chunk, self.entry, worker.source
        where = f"{chunk.file}:{self.name}"
        stored = locate(partial(_fetch, source, chunk.file), chunk.item, where=where)
        shape, strides = chunk.region.shape, contiguous_strides(chunk.region.shape)
        if (stored.dtype, stored.shape) != (entry.dtype, shape):
            raise DamagedError(
                f"`{source.url}/{chunk.file}`: `{self.name}` is {stored.dtype} "
                f"{list(stored.shape)} in its file, {entry.dtype} {list(shape)} in the index",
                hint=source.hint,
            )
        dtype: torch.dtype = getattr(torch, entry.dtype)
        box = self.region.within(chunk.region)
        nbytes = chunk.region.num_elements * dtype.itemsize
        if stored.strides != strides and nbytes > dtype.itemsize:
            # Such as a transposed parameter. This is rare, so the whole chunk is read.
            count = stored.data.nbytes // dtype.itemsize
            whole = torch.empty(count, dtype=dtype, device="cpu")
            data = worker.data(self.name, chunk, Span(stored.data.offset, whole.nbytes), None)
            if stored.crc32:
                data = data.with_crc32(stored.crc32)
            data.read(0, whole.nbytes, bytes_of(whole))
            put(self.target, whole.as_strided(shape, stored.strides)[box.slices()], self.name)
        else:
            data = worker.data(self.name, chunk, Span(stored.data.offset, nbytes), None)
            if stored.crc32 and box == Region.whole(shape):
                data = data.with_crc32(stored.crc32)
            for part in _slices(box, shape, dtype, self.target):
                _read_slice(data, part, dtype, shape, self.target)
        data.finish()
        return data.num_read


def _fetch(source: Source, file: str, offset: int, nbytes: int) -> bytes:
    return source.store.read(source.key(file), offset, offset + nbytes)
