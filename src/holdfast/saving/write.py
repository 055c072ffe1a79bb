"""Write one rank's file in one pass, and compute its checksums on the way."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from holdfast.format import checksum
from holdfast.format.manifest import Span, Table
from holdfast.format.sending import sent_by_fields
from holdfast.planning.file_layout import FileLayout, TensorItem
from holdfast.planning.shared_files import StoredFile
from holdfast.storage.direct import HUGE_PAGE_BYTES, PAGE_BYTES, huge_memory
from holdfast.storage.store import Buffer, Creating, FileWriter
from holdfast.timing import Spans

WINDOW_BYTES = 4 << 20
"""Size of one write to the store, a multiple of a block. It fits the CPU cache, so that the data is
still there after its checksum is computed."""

JOINED_BYTES_MAX = 64 << 10
"""Size below which consecutive parts are joined before they are written. Copying a part costs less
than passing one more buffer to the store."""


@sent_by_fields
@dataclass(frozen=True, slots=True)
class WriteResult:
    """What one rank has written durably: its file, bytes and checksums."""

    file: str = ""
    nbytes: int = 0
    """Bytes of `file`; 0 if another rank has created the file. Then that rank's result has the size
    and the table."""

    table: Table = field(default_factory=lambda: Table(0, 0))
    values: Mapping[str, tuple[Span, int]] = field(default_factory=dict)
    """Place and checksum of the container of each value, by name."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each stage of the save has taken so far."""

    others: tuple[StoredFile, ...] = ()
    """Other files, including linked ones, if this rank shares files with earlier checkpoints."""

    places: NDArray[np.int64] | None = None
    """Places of the items in all files: see `shared_index`. None if `file` has all items."""

    def files(self) -> list[StoredFile]:
        """Return all files that this rank has created or linked, sorted by number."""
        own = [StoredFile(self.file, self.nbytes, self.table)] if self.nbytes else []
        return sorted([*own, *self.others], key=lambda file: file.number)


WindowsOf = Callable[[TensorItem], Iterable[memoryview]]
"""`windows_of(item)`: returns the bytes of the item's region, row-major. They are one view, or
views of `WINDOW_BYTES` (the last may be shorter), each made when the iterator reaches it."""


def write(
    store: Creating,
    folder: str,
    layout: FileLayout,
    data: WindowsOf | memoryview,
    pace: Pace | None = None,
    spans: Spans | None = None,
) -> WriteResult:
    """Write one file and sync it. The time of both is added to `spans`, as `write` and `sync`.

    If `data` is a memoryview, it has the size of the file, and holds the data of all tensors at
    their offsets. This function adds the rest of the file to this memory, and writes it from there.
    """
    if not layout.nbytes:
        return WriteResult()
    spans, pace = spans or Spans(), pace or Pace()
    with ExitStack() as file:
        with spans("write"):
            writer = file.enter_context(store.create(f"{folder}/{layout.name}", layout.nbytes))
            if isinstance(data, memoryview):
                packed = _write_memory(writer, layout, data, pace)
            else:
                packed = _write_parts(writer, layout, data, pace)
        with spans("sync"):
            file.close()
    sums = {offset: checksum.checksum(container) for offset, container in layout.containers}
    values = {name: (span, sums[span.offset]) for names, span in layout.values for name in names}
    table = Table(layout.table_offset, checksum.checksum(packed))
    return WriteResult(layout.name, layout.nbytes, table, values)


def _write_parts(
    writer: FileWriter, layout: FileLayout, windows_of: WindowsOf, pace: Pace
) -> bytes:
    """Write the file part by part. Returns its table of checksums."""
    checksums: list[int] = []
    stream = _Stream(writer, pace, layout.nbytes)
    for item in layout.tensors:
        prefix, suffix, num_data = item.prefix, item.suffix, item.nbytes
        nbytes = len(prefix) + num_data + len(suffix)
        if num_data and nbytes < JOINED_BYTES_MAX:
            # For states of thousands of small tensors, this takes half as long as the other branch.
            (data,) = windows_of(item)
            assert len(data) == num_data, f"{item.name}: {len(data)} bytes, {num_data} expected"
            checksums.append(checksum.checksum(data))
            stream.put_small((prefix, data, suffix), nbytes)
        else:
            stream.put(prefix)
            checksums += _put_windows(stream, windows_of(item), item)
            stream.put(suffix)
    for _, container in layout.containers:
        stream.put(container)
    packed = checksum.pack(checksums)
    stream.put(packed)
    stream.flush()
    return packed


def _write_memory(writer: FileWriter, layout: FileLayout, memory: memoryview, pace: Pace) -> bytes:
    """Write the file from memory that holds the data. Returns its table of checksums.

    Everything else in the file consists of many small parts, each of which would be one more buffer
    to pass to the store. So these parts are copied into the memory first.
    """
    checksums: list[int] = []
    written = 0

    def put(offset: int, part: bytes) -> None:
        memory[offset : offset + len(part)] = part

    def write_to(stop: int) -> None:
        nonlocal written
        writer.write(written, [memory[written:stop]])
        pace.wait(stop - written)
        written = stop

    for item in layout.tensors:
        put(item.offset, item.prefix)
        put(item.data_stop, item.suffix)
        for start in range(item.data_offset, item.data_stop, WINDOW_BYTES):
            stop = min(start + WINDOW_BYTES, item.data_stop)
            checksums += checksum.block_checksums(memory[start:stop])
            if stop - written >= WINDOW_BYTES:
                write_to(written + WINDOW_BYTES)
    for offset, container in layout.containers:
        put(offset, container)
    packed = checksum.pack(checksums)
    put(layout.table_offset, packed)
    while written < layout.nbytes:
        write_to(min(written + WINDOW_BYTES, layout.nbytes))
    return packed


def _put_windows(stream: _Stream, windows: Iterable[memoryview], item: TensorItem) -> list[int]:
    """Write the data of one tensor. Returns the checksums of its blocks."""
    checksums: list[int] = []
    nbytes = 0
    for data in windows:
        for start in range(0, len(data), WINDOW_BYTES):
            window = data[start : start + WINDOW_BYTES]
            checksums += checksum.block_checksums(window)
            stream.put(window)
        nbytes += len(data)
    assert nbytes == item.nbytes, f"{item.name}: {nbytes} bytes, {item.nbytes} expected"
    return checksums


class Pace:
    """Limit on the bytes written per second. If it is None, there is no limit."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._started = time.monotonic()
        self._nbytes = 0

    def wait(self, nbytes: int) -> None:
        """Count `nbytes` as written, and wait until the limit allows that many."""
        self._nbytes += nbytes
        if self._bytes_per_s:
            due = self._started + self._nbytes / self._bytes_per_s
            time.sleep(max(0.0, due - time.monotonic()))


class _Stream:
    """Writes the parts of a file in order, a window at a time. Joins small parts."""

    def __init__(self, writer: FileWriter, pace: Pace, nbytes: int) -> None:
        """`nbytes`: size of the file."""
        self._writer = writer
        self._pace = pace
        self._parts: list[Buffer] = []
        self._offset = 0
        self._pending = 0
        self._pool = _Pool(min(HUGE_PAGE_BYTES, PAGE_BYTES + nbytes))
        self._memory: mmap.mmap | None = None
        """Memory that small parts are copied to; None before the first."""

        self._joined: int | None = None
        """Start in memory of small parts that are not in `_parts` yet; None if there are none."""

    def put(self, part: Buffer) -> None:
        nbytes = len(part)
        if nbytes < JOINED_BYTES_MAX:
            self.put_small((part,), nbytes)
            return
        self._end_joined()
        self._parts.append(part)
        self._pending += nbytes
        if self._pending >= WINDOW_BYTES:
            self.flush()

    def put_small(self, parts: Sequence[Buffer], nbytes: int) -> None:
        """Put several parts. `nbytes`: their total size, less than `JOINED_BYTES_MAX`."""
        memory = self._memory
        if memory is None or self._joined is None or memory.tell() + nbytes > len(memory):
            memory = self._begin_joined(nbytes)
        for part in parts:
            memory.write(part)
        self._pending += nbytes
        if self._pending >= WINDOW_BYTES:
            self.flush()

    def flush(self) -> None:
        self._end_joined()
        self._writer.write(self._offset, self._parts)
        self._offset += self._pending
        self._pace.wait(self._pending)
        self._parts, self._pending = [], 0

    def _begin_joined(self, nbytes: int) -> mmap.mmap:
        """Return memory with room for `nbytes` at its position."""
        if self._joined is not None:
            # Memory is full. So the next parts begin a window, which they fill.
            self.flush()
        # At the same distance from a page as in the file, so that the store need not copy it.
        place, memory = self._offset + self._pending, self._memory
        start = 0 if memory is None else memory.tell()
        start += (place - start) % PAGE_BYTES
        if memory is None or start + nbytes > len(memory):
            memory, start = self._pool.take(), place % PAGE_BYTES
        memory.seek(start)
        self._memory, self._joined = memory, start
        return memory

    def _end_joined(self) -> None:
        if self._memory is not None and self._joined is not None:
            self._parts.append(self._pool.view(self._joined, self._memory.tell()))
            self._joined = None


class _Pool:
    """Memory for joined parts. Once the store has read it, it is used again: the system would have
    to clear new memory."""

    def __init__(self, nbytes: int) -> None:
        """`nbytes`: size of the memory that `take` returns, or a little less."""
        self._nbytes = nbytes
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        self._taken = np.empty(0, np.uint8)

    def take(self) -> mmap.mmap:
        """Return memory to which no view refers."""
        # The array of the memory before now lives only until the last view of it ends.
        self._taken = np.empty(0, np.uint8)
        try:
            memory = self._free.get_nowait()
        except Empty:
            memory = huge_memory(self._nbytes)
        self._taken = np.frombuffer(memory, np.uint8)
        finalize(self._taken, self._free.put, memory).atexit = False
        return memory

    def view(self, start: int, stop: int) -> memoryview:
        """Return a view of the memory that was taken last."""
        return self._taken[start:stop].data
