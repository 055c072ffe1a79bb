"""Write files with `O_DIRECT`: at the speed of the disk, and without evicting training data from
the page cache."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread

from holdfast.storage.store import Buffer

PAGE_BYTES = 4096
"""Alignment of the offset, length and address of a direct write. Every disk accepts it."""

WINDOW_BYTES = HUGE_PAGE_BYTES = 2 << 20
"""Most bytes that are copied for one write: a huge page, which the disk writes in one request. The
windows of all threads together fit into the processor's cache."""

NUM_THREADS = 4
"""Number of writing threads. Each has its own buffer of `WINDOW_BYTES`, so some threads copy while
others wait for the disk."""

JOBS_AHEAD = 4
"""Maximum number of writes that wait for a thread."""

IN_PLACE_BYTES_MIN = 1 << 20
"""Minimum size of a part that is written without a copy, except for the incomplete pages at its
ends. Its address and its offset in the file must differ by whole pages."""

IN_PLACE_BYTES_MAX = 4 << 20
"""Maximum bytes of one write without a copy."""

_COPIED_BY_NUMPY_MAX = 8
"""Maximum number of parts of a window that numpy copies. Other threads run while numpy copies, but
it takes more time for each part."""

_BUFFERS_A_CALL = 512
"""Maximum number of buffers that are passed to one pwritev. Linux takes at most 1024."""

_NOTHING = memoryview(b"")


class BufferedWriter:
    """Writes through the page cache."""

    def __init__(self, file: int) -> None:
        self._file = file

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        _write_all(self._file, offset, [memoryview(part).cast("B") for part in parts if len(part)])


class DirectWriter:
    """Writes whole pages directly to the disk, and incomplete pages through the page cache.

    Fastest if each call of `write` begins at the offset where the last one ended. Threads copy one
    window at a time to aligned memory and write it, so that copying overlaps with the disk. Whole
    pages of a large part are written from its own memory, if they are whole pages of the file too.
    """

    def __init__(self, direct: int, buffered: int) -> None:
        """`direct`, `buffered`: descriptors of one file, opened with and without `O_DIRECT`."""
        self._direct = direct
        self._edges = BufferedWriter(buffered)
        self._threads = _Threads(NUM_THREADS)
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(NUM_THREADS):
            self._free.put(huge_memory(WINDOW_BYTES))
        self._parts: list[memoryview] = []
        self._start = self._stop = 0
        """Range of the file that `_parts` cover. `_start` is page-aligned if there are parts."""

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        for part in parts:
            view = memoryview(part).cast("B")
            if len(view):
                self._put(offset, view)
            offset += len(view)

    def finish(self) -> None:
        """Wait until everything has been written."""
        self._end_range()
        self._threads.finish()

    def close(self) -> None:
        """End the threads. Writes that no thread has begun are dropped."""
        self._threads.stop()

    def _put(self, offset: int, view: memoryview) -> None:
        if offset != self._stop or (not self._parts and offset % PAGE_BYTES):
            self._end_range()
            edge = min(-offset % PAGE_BYTES, len(view))
            self._edges.write(offset, [view[:edge]])
            offset, view = offset + edge, view[edge:]
            self._start = self._stop = offset
        if _fits_in_place(view, offset):
            # With these bytes, the waiting parts are whole pages. They still fit into a window,
            # since that is whole pages too.
            view = self._add(view, -offset % PAGE_BYTES)
            while len(view) >= PAGE_BYTES:
                view = self._send(self._stop - self._start, view)
        while len(view):
            view = self._add(view, WINDOW_BYTES - (self._stop - self._start))
            if self._stop - self._start == WINDOW_BYTES:
                self._send(WINDOW_BYTES)

    def _add(self, view: memoryview, nbytes: int) -> memoryview:
        """Let the first `nbytes` of `view` wait. Returns the rest."""
        if part := view[:nbytes]:
            self._parts.append(part)
            self._stop += len(part)
        return view[nbytes:]

    def _send(self, nbytes: int, in_place: memoryview = _NOTHING) -> memoryview:
        """Let a thread copy and write the first `nbytes` of the waiting parts, which are whole
        pages, and then the first pages of `in_place` without a copy. Returns the rest of it.

        `in_place`: memory that starts at the start of a page, and goes into the file right after
            these `nbytes`, which then are all that wait.

        Raises the error of an earlier write that failed.
        """
        parts, rest = _split(self._parts, nbytes)
        stop = min(len(in_place) // PAGE_BYTES * PAGE_BYTES, IN_PLACE_BYTES_MAX)
        if nbytes or stop:
            self._threads.submit(partial(self._write, parts, in_place[:stop], self._start))
        self._parts, self._start = rest, self._start + nbytes + stop
        self._stop += stop
        return in_place[stop:]

    def _end_range(self) -> None:
        """Write the remaining parts, so that the next range can begin elsewhere."""
        self._send((self._stop - self._start) // PAGE_BYTES * PAGE_BYTES)
        self._edges.write(self._start, self._parts)
        self._parts = []

    def _write(self, parts: Sequence[memoryview], in_place: memoryview, offset: int) -> None:
        window = self._free.get() if parts else None
        try:
            copied = _NOTHING if window is None else _copied(parts, window)
            _write_all(self._direct, offset, [view for view in (copied, in_place) if len(view)])
        except OSError as error:
            if error.errno != errno.EFAULT or not in_place:
                raise
            # The system can read this memory, but not write from it: a driver may have mapped it.
            self._edges.write(offset, [*parts, in_place])
        finally:
            if window is not None:
                self._free.put(window)


def _write_all(file: int, offset: int, views: list[memoryview]) -> None:
    """Write all bytes of these views to a file. None of them is empty. Changes the list."""
    first = 0
    while first < len(views):
        count = os.pwritev(file, views[first : first + _BUFFERS_A_CALL], offset)
        offset += count
        while first < len(views) and count >= len(views[first]):
            count -= len(views[first])
            first += 1
        if count:
            views[first] = views[first][count:]


class _Threads:
    """Up to `count` threads, as many as the system allows.

    If a memory limit allows no threads, the caller does the work itself. A `ThreadPoolExecutor`
    would instead raise an error in the middle of the work.
    """

    def __init__(self, count: int) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._running: list[Thread] = []
        for number in range(count):
            thread = Thread(target=self._work, name=f"holdfast-write_{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                break
            self._running.append(thread)
        self._places = len(self._running) + JOBS_AHEAD
        self._tokens: SimpleQueue[None] = SimpleQueue()
        """One entry per job that may be added: a `Queue` with a maximum size takes more time."""
        for _ in range(self._places):
            self._tokens.put(None)

    def submit(self, job: Callable[[], None]) -> None:
        """Let a thread do a job. Raises the error of an earlier job."""
        self._raise_error()
        if self._running:
            self._tokens.get()
            self._jobs.put(job)
        else:
            job()

    def finish(self) -> None:
        """Wait until all jobs are done. Raises the error of a job that failed."""
        for _ in range(self._places):
            self._tokens.get()
        for _ in range(self._places):
            self._tokens.put(None)
        self._raise_error()

    def stop(self) -> None:
        """End the threads. Jobs that no thread has begun are dropped."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._running:
            self._jobs.put(None)
        for thread in self._running:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised by the next call
                self._error = self._error or error
            finally:
                del job  # With it, the memory of its parts would stay until the next job.
                self._tokens.put(None)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def huge_memory(nbytes: int) -> mmap.mmap:
    """Allocate at least `nbytes` of page-aligned memory, on huge pages where whole ones fit and are
    available: a disk writes a huge page in one request.

    The memory is freed when the last reference to it ends.
    """
    # Linux aligns only whole huge pages. The pages at the end that are never used take no memory.
    rounded = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE, 0, nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
    return memory


def _split(parts: list[memoryview], nbytes: int) -> tuple[list[memoryview], list[memoryview]]:
    """Split a list of parts after its first `nbytes`: return the parts before and after. Changes
    the list."""
    rest: list[memoryview] = []
    over = sum(map(len, parts)) - nbytes
    while over:
        last = parts.pop()
        keep = max(0, len(last) - over)
        rest.insert(0, last[keep:])
        over -= len(last) - keep
        if keep:
            parts.append(last[:keep])
    return parts, rest


def _fits_in_place(view: memoryview, offset: int) -> bool:
    """Return whether `view` is large, and its pages in the file are pages in memory."""
    if len(view) < IN_PLACE_BYTES_MIN:
        return False
    import numpy as np  # Readers of a store do not need this import.

    return (np.frombuffer(view, np.uint8).ctypes.data - offset) % PAGE_BYTES == 0


def _copied(parts: Sequence[memoryview], window: mmap.mmap) -> memoryview:
    """Copy the parts to the window, one after the other. Returns the copy."""
    if len(parts) > _COPIED_BY_NUMPY_MAX:
        window.seek(0)
        for part in parts:
            window.write(part)
        return memoryview(window)[: window.tell()]
    import numpy as np

    copy, offset = memoryview(window), 0
    for part in parts:
        target = copy[offset : offset + len(part)]
        # Unlike an assignment, `copyto` releases the GIL.
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(part, np.uint8))
        offset += len(part)
    return copy[:offset]


def open_direct(path: str) -> int | None:
    """Open a file with `O_DIRECT`; return None if its file system does not support that."""
    with suppress(OSError):
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    return None
