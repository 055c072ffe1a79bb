"""Bytes of a checkpoint into tensors: only the ranges that are wanted, each block checked."""

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
from holdfast.planning.gc_pause import gc_paused
from holdfast.planning.read_plan import ByteRange, byte_ranges, read_items
from holdfast.state.layout import bytes_of
from holdfast.state.shard import Piece
from holdfast.storage.store import Reader

THREADS_MAX = 4

JOB_BYTES = 32 << 20
"""About what a thread takes on at once: whole blocks. Two that take parts of one chunk may both
read the block between them."""

SMALL_BYTES = 128 << 10
"""Smaller chunks that lie close to each other are read together: a copy costs less than a call."""

GAP_BYTES_MAX = 16 << 10
"""Read along between two small chunks: more than the frames of two items."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A tensor to fill: where its pieces lie in the stored one, and the memory that they go to."""

    name: str
    pieces: Sequence[Piece]
    local: torch.Tensor


def threads_for(num_local: int) -> int:
    """How many threads read on each of so many ranks of this host: together no more than it has
    cores, since more would take from each other the cache that blocks are checked in."""
    cores = len(os.sched_getaffinity(0))
    return min(THREADS_MAX, max(2 if num_local == 1 else 1, cores // num_local))


def read_tensors(source: Source, wanted: Sequence[Wanted], threads: int | None = None) -> int:
    """Fill every wanted tensor. Returns the bytes read.

    Files are read in the order of their bytes, by `threads` (those of a process alone on its host,
    if not said); the first error ends them all.

    Raises:
        DamagedError: bytes that are not those that were written, or not there.
    """
    return _run(source, _jobs(source, wanted), threads or threads_for(1))


@gc_paused()
def _jobs(source: Source, wanted: Sequence[Wanted]) -> list[_Job]:
    """What there is to read, in the order of its bytes."""
    jobs: list[_Job] = []
    small: list[_Small] = []
    for want in wanted:
        entry = source.manifest.tensors[want.name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        for piece in want.pieces:
            for move in read_items(want.name, entry, piece.region):
                target = within(want.local, piece.local_of(move.region))
                chunk, nbytes = move.chunk, move.chunk.region.num_elements * dtype.itemsize
                if chunk.data_offset is None:
                    jobs.append(_Foreign(want.name, entry, chunk, move.region, target))
                elif nbytes <= SMALL_BYTES and chunk.first_block is not None:
                    at = chunk.data_offset
                    small.append(_Small(at, nbytes, want.name, dtype, chunk, move.region, target))
                else:
                    jobs += _stretches(want.name, dtype, chunk, move.region, target)
    jobs += _batches(small)
    jobs.sort(key=lambda job: (job.chunk.file, job.start))
    return jobs


def within(tensor: torch.Tensor, box: Region) -> torch.Tensor:
    """A box of `tensor`, in its memory."""
    if not tensor.ndim or (not any(box.start) and box.stop == tuple(tensor.shape)):
        return tensor
    return tensor[box.slices()]


# ------------------------------------------------------------------------------------- the threads


class _Job(Protocol):
    """What one thread does at a time."""

    @property
    def chunk(self) -> Chunk:
        """Whose file is read."""
        ...

    @property
    def start(self) -> int:
        """About where in the file."""
        ...

    def run(self, worker: _Worker) -> int:
        """Returns the bytes read."""
        ...


class _Worker:
    """What one thread has to itself: the file that it reads, and memory for what cannot go straight
    to its place, page-locked where there is a GPU to take it on to."""

    def __init__(self, source: Source) -> None:
        self.source = source
        pinned = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.memory = torch.empty(ROOM_BYTES, dtype=torch.uint8, pin_memory=pinned, device="cpu")
        self.room = self.memory.numpy().data
        self._file: str | None = None
        self._open = ExitStack()

    def reader(self, file: str) -> Reader:
        """Of a file; the one before it is closed."""
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

    def run(self, jobs: Iterator[_Job]) -> int:
        """Do jobs until there are none left."""
        with self._open:
            return sum(job.run(self) for job in jobs)


class _Queue:
    """Jobs for several threads, each handed out once; none once one has failed."""

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
            done = _Worker(source).run(self)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for this one
            self.errors.append(error)
            return
        with self._mutex:
            self.num_read += done


def _run(source: Source, jobs: Sequence[_Job], threads: int) -> int:
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


# ------------------------------------------------------------------------- chunks of Holdfast's own


@dataclass(frozen=True, slots=True)
class _Step:
    """A part of a chunk, or as much of it as one thread takes on."""

    part: ByteRange
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class _Stretch:
    """Some of the parts of one chunk that follow each other."""

    name: str
    dtype: torch.dtype
    chunk: Chunk
    steps: Sequence[_Step]
    target: torch.Tensor

    @property
    def start(self) -> int:
        return self.chunk.item.offset + self.steps[0].start

    def run(self, worker: _Worker) -> int:
        assert self.chunk.data_offset is not None
        span = Span(self.chunk.data_offset, self.chunk.region.num_elements * self.dtype.itemsize)
        checksums = worker.source.checksums(self.chunk, span.nbytes)
        data = worker.data(self.name, self.chunk, span, checksums)
        for step in self.steps:
            _take(data, step, self.dtype, self.chunk.region.shape, self.target)
        return data.num_read


def _stretches(
    name: str, dtype: torch.dtype, chunk: Chunk, region: Region, target: torch.Tensor
) -> Iterator[_Stretch]:
    steps: list[_Step] = []
    nbytes = 0
    for step in _steps(region.within(chunk.region), chunk.region.shape, dtype, target):
        if steps and nbytes + step.stop - step.start > JOB_BYTES:
            yield _Stretch(name, dtype, chunk, steps, target)
            steps, nbytes = [], 0
        steps.append(step)
        nbytes += step.stop - step.start
    if steps:
        yield _Stretch(name, dtype, chunk, steps, target)


def _steps(
    box: Region, shape: tuple[int, ...], dtype: torch.dtype, target: torch.Tensor
) -> Iterator[_Step]:
    for part in byte_ranges(box, shape, dtype.itemsize, WINDOW_BYTES):
        if _goes_straight(part, dtype, _into(target, part)):
            at = part.start
            while at < part.stop:
                end = min((at // JOB_BYTES + 1) * JOB_BYTES, part.stop)
                yield _Step(part, at, end)
                at = end
        else:
            for piece in _windows(part, dtype.itemsize):
                yield _Step(piece, piece.start, piece.stop)


def _into(target: torch.Tensor, part: ByteRange) -> torch.Tensor:
    return within(target, part.box)


def _goes_straight(part: ByteRange, dtype: torch.dtype, into: torch.Tensor) -> bool:
    plain = into.is_cpu and into.is_contiguous() and not (into.is_conj() or into.is_neg())
    return part.contiguous and plain and into.dtype == dtype


def _windows(part: ByteRange, itemsize: int) -> Iterator[ByteRange]:
    """A part as it is read; a long contiguous one in pieces: rows of its first long dim."""
    if part.stop - part.start <= WINDOW_BYTES:
        yield part
        return
    box = part.box
    dim = next(d for d, size in enumerate(box.shape) if size > 1)
    row = box.num_elements // box.shape[dim] * itemsize
    rows = max(1, WINDOW_BYTES // row)
    for first in range(0, box.shape[dim], rows):
        last = min(first + rows, box.shape[dim])
        start, stop = list(box.start), list(box.stop)
        start[dim], stop[dim] = box.start[dim] + first, box.start[dim] + last
        piece = Region(tuple(start), tuple(stop))
        yield from _windows(
            ByteRange(part.start + first * row, part.start + last * row, piece, True), itemsize
        )


def _take(
    data: ChunkData,
    step: _Step,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    target: torch.Tensor,
) -> None:
    """Bring one step to its place."""
    part = step.part
    into = _into(target, part)
    if _goes_straight(part, dtype, into):
        memory = bytes_of(into)[step.start - part.start : step.stop - part.start]
        data.read(step.start, step.stop, memory)
        return
    found = torch.frombuffer(data.window(part.start, part.stop), dtype=dtype)
    strides = contiguous_strides(part.box.shape if part.contiguous else shape)
    put(into, found.as_strided(part.box.shape, strides), data.name)


# ------------------------------------------------------------------------- many small ones together


@dataclass(frozen=True, slots=True, eq=False)
class _Small:
    """A chunk of one block, and the region of it that is wanted."""

    start: int
    nbytes: int
    name: str
    dtype: torch.dtype
    chunk: Chunk
    region: Region
    target: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Small chunks of one file that lie close to each other, in their order."""

    items: Sequence[_Small]

    @property
    def chunk(self) -> Chunk:
        return self.items[0].chunk

    @property
    def start(self) -> int:
        return self.items[0].start

    def run(self, worker: _Worker) -> int:
        start, last = self.start, max(item.start + item.nbytes for item in self.items)
        file, source = self.chunk.file, worker.source
        done = worker.reader(file).read_into(start, worker.room[: last - start])
        for item in self.items:
            at = item.start - start
            if at + item.nbytes > done:
                raise ends_inside(source, file, item.name, start + done)
            sums = source.checksums(item.chunk, item.nbytes)
            if sums is not None:
                check(source, file, item.name, 0, worker.room[at : at + item.nbytes], sums)
            shape = item.chunk.region.shape
            count = item.nbytes // item.dtype.itemsize
            held = torch.frombuffer(worker.room, dtype=item.dtype, count=count, offset=at)
            box = item.region.within(item.chunk.region)
            put(item.target, within(held.view(shape), box), item.name)
        return done


def _batches(small: list[_Small]) -> Iterator[_Batch]:
    small.sort(key=lambda item: (item.chunk.file, item.start))
    batch: list[_Small] = []
    stop = 0
    for item in small:
        if batch and (
            item.chunk.file != batch[0].chunk.file
            or item.start > stop + GAP_BYTES_MAX
            or item.start + item.nbytes > batch[0].start + WINDOW_BYTES
        ):
            yield _Batch(batch)
            batch = []
            stop = 0
        batch.append(item)
        stop = max(stop, item.start + item.nbytes)
    if batch:
        yield _Batch(batch)


# ------------------------------------------------------------------ chunks that anyone has written


@dataclass(frozen=True, slots=True, eq=False)
class _Foreign:
    """A region of a chunk of which only its container knows where the elements are."""

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
            # As a transposed parameter is kept. Rare: read the chunk whole, then pick.
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
            for step in _steps(box, shape, dtype, self.target):
                _take(data, step, dtype, shape, self.target)
        data.finish()
        return data.num_read


def _fetch(source: Source, file: str, offset: int, nbytes: int) -> bytes:
    return source.store.read(source.key(file), offset, offset + nbytes)
