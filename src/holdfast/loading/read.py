"""Read tensors of a checkpoint: only the wanted byte ranges, each block checked."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from holdfast import accelerator
from holdfast.catalog.source import (
    ROOM_BYTES,
    WINDOW_BYTES,
    ChunkData,
    Source,
    check,
    ends_inside,
    locate_chunk,
)
from holdfast.format.manifest import Chunk, Span
from holdfast.format.region import Region
from holdfast.format.torchzip import contiguous_strides
from holdfast.loading.fit import put
from holdfast.planning.divide import aligned, divide, grouped
from holdfast.planning.gc_pause import gc_paused
from holdfast.planning.read_plan import ByteRange, byte_ranges, read_items
from holdfast.state.layout import box_of, bytes_of
from holdfast.state.shard import Piece
from holdfast.storage.store import FileReader

THREADS_MAX = 4
"""Most threads per rank that read into host memory. More threads are no faster."""

DISTANT_THREADS_MAX = 16
"""Most threads of a host that read from a `Distant` store. They mostly wait for answers, and need
hardly any CPU time."""

DISTANT_THREADS_MIN = 4
"""Fewest threads per rank that read from a `Distant` store."""

DEVICE_THREADS_MAX = 16
"""Most threads per rank that read for an accelerator. Its link carries more than four threads can
read."""

RING_BUFFERS = 3
"""Number of buffers of a thread that reads for an accelerator. While the thread reads into one, the
others are copied to the device."""

JOB_BYTES = 32 << 20
"""Approximate number of bytes that one job reads, a multiple of the block size. Two jobs that read
adjacent parts of a chunk may both read the block at their boundary."""

SMALL_BYTES = 128 << 10
"""Largest chunk that is read together with chunks close to it. They are read into a buffer and
copied from there, which costs less than a read call for each."""

GAP_BYTES_MAX = 16 << 10
"""Largest gap between small chunks that are read together. It is larger than the headers that
`torch.save` writes between two tensors."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A tensor to fill: the pieces of a stored tensor to read, and the memory that they go to."""

    name: str
    pieces: Sequence[Piece]
    local: torch.Tensor


def read_tensors(
    source: Source, wanted: Sequence[Wanted], threads: int | None = None, *, num_local: int = 1
) -> int:
    """Fill every wanted tensor. Returns the bytes read.

    Files are read in the order of their bytes. The first error stops all threads. `threads`: number
    of reading threads; None: as `threads_for` decides. `num_local`: number of ranks on this host.

    Raises:
        DamagedError: bytes are missing, or are not the bytes that were written.
    """
    devices = accelerator.devices_of(want.local for want in wanted)
    threads = threads or threads_for(num_local, source, on_device=bool(devices))
    return _run(source, plan_reads(source, wanted), threads, devices)


def threads_for(num_local: int, source: Source, *, on_device: bool = False) -> int:
    """Return the number of reading threads per rank, for `num_local` ranks on this host.
    `on_device`: whether they read for an accelerator.

    Unless the store is `Distant`, the ranks divide the cores of the host among them. More threads
    would evict each other's blocks from the CPU cache before the blocks are checked.
    """
    if source.request_bytes is not None:
        return max(DISTANT_THREADS_MIN, DISTANT_THREADS_MAX // num_local)
    cores = len(os.sched_getaffinity(0))
    most = DEVICE_THREADS_MAX if on_device else THREADS_MAX
    return min(most, max(2 if num_local == 1 else 1, cores // num_local))


class ReadJob(NamedTuple):
    """Part of a read, done by one thread."""

    file: str
    start: int
    """Approximate offset in the file."""

    run: Callable[[_Worker], int]
    """Function that reads the data, and returns the number of bytes read."""


@gc_paused()
def plan_reads(source: Source, wanted: Sequence[Wanted]) -> list[ReadJob]:
    """Return the jobs that fill all wanted tensors, in the order of their bytes in the files."""
    jobs: list[ReadJob] = []
    small: list[_Read] = []
    # A thread sends the requests of its job one after another, and waits for each answer. For a
    # `Distant` store, make each job one request, so that all threads have work.
    job_bytes = source.request_bytes or JOB_BYTES
    for want in wanted:
        entry = source.manifest.tensors[want.name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        for piece in want.pieces:
            for item in read_items(want.name, entry, piece.region):
                target = box_of(want.local, piece.local_of(item.region))
                chunk, nbytes = item.chunk, item.chunk.region.num_elements * dtype.itemsize
                read = _Read(want.name, dtype, chunk, item.region, target, nbytes)
                if chunk.data_offset is None:
                    run = partial(_read_container, read)
                    jobs.append(ReadJob(chunk.file, chunk.item.offset, run))
                elif nbytes <= SMALL_BYTES and chunk.first_block is not None:
                    small.append(read)
                elif nbytes <= job_bytes:
                    # The thread finds the slices itself, while others read.
                    run = partial(_read_slices, read, _slices(read, job_bytes))
                    jobs.append(ReadJob(chunk.file, chunk.data_offset, run))
                else:
                    for slices in grouped(_slices(read, job_bytes), _Slice.nbytes, job_bytes):
                        start = chunk.data_offset + slices[0].start
                        jobs.append(ReadJob(chunk.file, start, partial(_read_slices, read, slices)))
    for batch in _batches(small):
        first = batch[0]
        jobs.append(ReadJob(first.chunk.file, first.data_start, partial(_read_batch, batch)))
    jobs.sort(key=lambda job: (job.file, job.start))
    return jobs


class _Read(NamedTuple):
    """Read of a region of one chunk, and the memory that the elements go to."""

    name: str
    dtype: torch.dtype
    chunk: Chunk
    region: Region
    """Position of the wanted elements in the whole tensor."""

    target: torch.Tensor
    nbytes: int
    """Bytes of data in the whole chunk, of which `region` may be a part."""

    @property
    def box(self) -> Region:
        """Position of the wanted elements in the chunk."""
        return self.region.within(self.chunk.region)

    @property
    def data_start(self) -> int:
        """Offset of the chunk's data in its file."""
        assert self.chunk.data_offset is not None, "`_read_container` reads other chunks"
        return self.chunk.data_offset


# ------------------------------------------------------------------------------------------ threads


def _run(
    source: Source, jobs: Sequence[ReadJob], threads: int, devices: Sequence[torch.device]
) -> int:
    """Run all jobs in threads, this one included. Returns the bytes read."""
    queue = deque(jobs)
    # A target may still be in use, such as by the kernel that initializes it. The reading threads
    # wait for such work.
    queued = accelerator.QueuedWork(devices)
    num_read: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            worker = _Worker(source, devices)
            with queued.followed():
                num_read.append(worker.run(queue))
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for this one
            errors.append(error)
            # The other threads stop after the jobs that they have begun.
            queue.clear()

    others = [
        threading.Thread(target=work, name="holdfast-read", daemon=True)
        for _ in range(min(threads, len(jobs)) - 1)
    ]
    for thread in others:
        thread.start()
    if jobs:
        work()
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]
    return sum(num_read)


class _Worker:
    """State of one reading thread: its open file, and buffers for bytes that cannot be read
    straight into the wanted tensor."""

    def __init__(self, source: Source, devices: Sequence[torch.device]) -> None:
        self.source = source
        self.ring = accelerator.Ring(RING_BUFFERS, ROOM_BYTES, devices)
        self._file: str | None = None
        self._open = ExitStack()

    def run(self, queue: deque[ReadJob]) -> int:
        """Run jobs until none is left. Returns the bytes read."""
        num_read = 0
        with self._open:
            while True:
                try:
                    job = queue.popleft()
                except IndexError:
                    return num_read
                num_read += job.run(self)

    def reader(self, file: str) -> FileReader:
        """Open `file` if it is not open yet, and return its reader. Closes the file that was open
        before."""
        if file != self._file:
            self._open.close()
            self._reader = self._open.enter_context(self.source.store.open(self.source.key(file)))
            self._file = file
        return self._reader

    def data(self, read: _Read, start: int, checksums: Sequence[int] | None) -> ChunkData:
        """Return a reader of a chunk's data. `start`: offset of the data in its file. `checksums`:
        one per block of the data; None if they are unknown."""
        place = read.chunk.file, Span(start, read.nbytes)
        reader = self.reader(read.chunk.file)
        return ChunkData(self.source, read.name, place, checksums, reader, self.ring.current)


# ------------------------------------------------------------------------------------- large chunks


@dataclass(frozen=True, slots=True)
class _Slice:
    """Bytes `start` to `stop` of a chunk's data, read by one call. They lie in `range`."""

    range: ByteRange
    start: int
    stop: int

    def nbytes(self) -> int:
        return self.stop - self.start


def _read_slices(read: _Read, slices: Iterable[_Slice], worker: _Worker) -> int:
    """Read consecutive slices of one chunk."""
    checksums = worker.source.checksums(read.chunk, read.nbytes)
    data = worker.data(read, read.data_start, checksums)
    for part in slices:
        _read_slice(data, part, read, worker.ring)
    return data.num_read


def _slices(read: _Read, direct_bytes: int = JOB_BYTES) -> Iterator[_Slice]:
    """Yield the slices of a chunk that hold the wanted elements. A slice has up to `direct_bytes`
    if it is read straight into the wanted tensor, otherwise up to `WINDOW_BYTES`."""
    itemsize = read.dtype.itemsize
    for whole in byte_ranges(read.box, read.chunk.region.shape, itemsize, WINDOW_BYTES):
        if _is_direct(whole, read.dtype, box_of(read.target, whole.box)):
            for start, stop in aligned(whole.start, whole.stop, direct_bytes):
                yield _Slice(whole, start, stop)
        elif whole.stop - whole.start <= WINDOW_BYTES:
            yield _Slice(whole, whole.start, whole.stop)
        else:
            # Only a contiguous range is longer than `WINDOW_BYTES`.
            start = whole.start
            for rows in divide(whole.box, WINDOW_BYTES // itemsize):
                stop = start + rows.num_elements * itemsize
                yield _Slice(ByteRange(start, stop, rows, contiguous=True), start, stop)
                start = stop


def _is_direct(stored: ByteRange, dtype: torch.dtype, target: torch.Tensor) -> bool:
    """Whether the bytes of the range `stored` can be read straight into `target`, without a
    conversion."""
    plain = target.is_cpu and target.is_contiguous() and not (target.is_conj() or target.is_neg())
    return stored.contiguous and plain and target.dtype == dtype


def _read_slice(data: ChunkData, part: _Slice, read: _Read, ring: accelerator.Ring) -> None:
    """Read one slice, and put its elements into the wanted tensor."""
    stored = part.range
    target = box_of(read.target, stored.box)
    if _is_direct(stored, read.dtype, target):
        memory = bytes_of(target)[part.start - stored.start : part.stop - stored.start]
        data.read(part.start, part.stop, memory)
        return
    window = data.window(stored.start, stored.stop, ring.current)
    elements = torch.frombuffer(window, dtype=read.dtype)
    strides = contiguous_strides(stored.box.shape if stored.contiguous else read.chunk.region.shape)
    put(target, elements.as_strided(stored.box.shape, strides), read.name, blocking=False)
    ring.advance()


# ------------------------------------------------------------------------------------- small chunks


def _read_batch(reads: Sequence[_Read], worker: _Worker) -> int:
    """Read small chunks that lie close to each other in one file, in file order."""
    start, stop = reads[0].data_start, max(read.data_start + read.nbytes for read in reads)
    file, source = reads[0].chunk.file, worker.source
    room = worker.ring.current
    num_read = worker.reader(file).read_into(start, room[: stop - start])
    for read in reads:
        offset = read.data_start - start
        if offset + read.nbytes > num_read:
            raise ends_inside(source, file, read.name, start + num_read)
        checksums = source.checksums(read.chunk, read.nbytes)
        if checksums is not None:
            data = room[offset : offset + read.nbytes]
            check(source, file, read.name, 0, data, checksums)
        count = read.nbytes // read.dtype.itemsize
        elements = torch.frombuffer(room, dtype=read.dtype, count=count, offset=offset)
        stored = box_of(elements.view(read.chunk.region.shape), read.box)
        put(read.target, stored, read.name, blocking=False)
    worker.ring.advance()
    return num_read


def _batches(small: list[_Read]) -> Iterator[list[_Read]]:
    small.sort(key=lambda read: (read.chunk.file, read.data_start))
    batch: list[_Read] = []
    first = stop = 0
    for read in small:
        start = read.data_start
        if batch and (
            read.chunk.file != batch[0].chunk.file
            or start > stop + GAP_BYTES_MAX
            or start + read.nbytes > first + WINDOW_BYTES
        ):
            yield batch
            batch, stop = [], 0
        if not batch:
            first = start
        batch.append(read)
        stop = max(stop, start + read.nbytes)
    if batch:
        yield batch


# ------------------------------------------------------------------- chunks without a known offset


def _read_container(read: _Read, worker: _Worker) -> int:
    """Read from a chunk that another program wrote. The index has neither the offset of its data
    nor its strides, so both are read from the archive around the data."""
    shape = read.chunk.region.shape
    stored = locate_chunk(worker.source, read.name, read.chunk)
    transposed = stored.strides != contiguous_strides(shape)
    if transposed and read.nbytes > read.dtype.itemsize:
        # For example, a transposed parameter was saved. This is rare, so read the whole chunk.
        count = stored.data.nbytes // read.dtype.itemsize
        whole = torch.empty(count, dtype=read.dtype, device="cpu")
        data = worker.data(read._replace(nbytes=whole.nbytes), stored.data.offset, None)
        if stored.crc32:
            data = data.with_crc32(stored.crc32)
        data.read(0, whole.nbytes, bytes_of(whole))
        put(read.target, whole.as_strided(shape, stored.strides)[read.box.slices()], read.name)
    else:
        data = worker.data(read, stored.data.offset, None)
        if stored.crc32 and read.box == Region.whole(shape):
            data = data.with_crc32(stored.crc32)
        for part in _slices(read):
            _read_slice(data, part, read, worker.ring)
    data.finish()
    return data.num_read
