"""Writing a file past the page cache: at the disk's own speed, and nothing that training has cached
makes way for a checkpoint."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from holdfast.storage.store import Buffer

if TYPE_CHECKING:
    from concurrent.futures import Future

PAGE_BYTES = 4096
"""Offsets, lengths and addresses of direct writes are multiples of this, on every disk so far."""

WINDOW_BYTES = 2 << 20
"""Written at once: one huge page, which the disk takes as one piece, and few enough that all
windows together stay in the processor's cache."""

NUM_THREADS = 4
"""Each has a window: some copy while others wait for the disk."""

WINDOWS_AHEAD = 4
"""What waits for a thread at most: parts that were handed over are about to be written."""

IN_PLACE_BYTES_MIN = 1 << 20
"""A part that is as large, and lies on pages as its place in the file does, is written from where
it is."""

_FEW = 8
"""So many parts are copied one by one; more are joined first."""

_BUFFERS_A_CALL = 512
"""Linux takes at most 1024 buffers in one pwritev."""


class BufferedWriter:
    """Writes through the page cache."""

    def __init__(self, file: int) -> None:
        self._file = file

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        while views:
            count = os.pwritev(self._file, views[:_BUFFERS_A_CALL], offset)
            offset += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

    def finish(self) -> None:
        """All has been written."""


class DirectWriter:
    """Writes whole pages past the page cache; what is left at the ends of ranges goes through it.
    Fastest where each range begins where the last one ended.

    Threads take one window of the file after the other, copy it to memory that the disk can read,
    and write it. So the copies cost no time beside the disk's own.
    """

    def __init__(self, direct: int, buffered: int) -> None:
        """`direct` and `buffered` are the same file, opened with `O_DIRECT` and without."""
        self._direct = direct
        self._edges = BufferedWriter(buffered)
        self._threads = _Threads(NUM_THREADS)
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for window in _windows():
            self._free.put(window)
        self._writing: deque[Future[None]] = deque()
        self._parts: list[memoryview] = []
        self._start = self._stop = 0
        """What of the file the parts are; `_start` is that of a page, where there are any."""

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        for part in parts:
            view = memoryview(part).cast("B")
            if len(view):
                self._put(offset, view)
            offset += len(view)

    def finish(self) -> None:
        """All has been handed over: wait until it is written."""
        self._leave()
        while self._writing:
            self._writing.popleft().result()

    def close(self) -> None:
        """Stop the threads; what none has begun yet is not written."""
        self._threads.stop()

    def _put(self, offset: int, view: memoryview) -> None:
        if offset != self._stop or (not self._parts and offset % PAGE_BYTES):
            self._leave()
            edge = min(-offset % PAGE_BYTES, len(view))
            self._edges.write(offset, [view[:edge]])
            offset, view = offset + edge, view[edge:]
            self._start = self._stop = offset
        in_place = _fits_in_place(view, offset)
        if in_place:
            # All before it is whole pages, since it begins on one.
            self._send(self._stop - self._start)
        while len(view):
            taken = view[: WINDOW_BYTES - (self._stop - self._start)]
            self._parts.append(taken)
            self._stop += len(taken)
            view = view[len(taken) :]
            if self._stop - self._start == WINDOW_BYTES:
                self._send(WINDOW_BYTES, in_place=in_place)
        if in_place:
            self._send((self._stop - self._start) // PAGE_BYTES * PAGE_BYTES, in_place=True)

    def _send(self, nbytes: int, *, in_place: bool = False) -> None:
        """Let a thread write so many bytes, whole pages, of what is there. Raises the error of one
        that failed."""
        if not nbytes:
            return
        parts, rest = _split(self._parts, nbytes)
        work = (
            partial(self._pwrite, parts[0], self._start)
            if in_place
            else partial(self._copy_and_write, parts, self._start)
        )
        self._writing.append(self._threads.submit(work))
        self._parts, self._start = rest, self._start + nbytes
        while len(self._writing) > NUM_THREADS + WINDOWS_AHEAD:
            self._writing.popleft().result()

    def _leave(self) -> None:
        """The next range begins elsewhere."""
        self._send((self._stop - self._start) // PAGE_BYTES * PAGE_BYTES)
        self._edges.write(self._start, self._parts)
        self._parts = []

    def _copy_and_write(self, parts: Sequence[memoryview], offset: int) -> None:
        window = self._free.get()
        try:
            self._pwrite(window[: _gather(parts, window)], offset)
        finally:
            self._free.put(window)

    def _pwrite(self, view: memoryview, offset: int) -> None:
        while len(view):
            count = os.pwrite(self._direct, view, offset)
            view, offset = view[count:], offset + count


class _Threads:
    """As many threads as are asked for, or can be had: under a limit of memory there may be none,
    and then the caller does the work. The standard library's pool raises there, half way."""

    def __init__(self, count: int) -> None:
        from concurrent.futures import Future  # Whoever only looks at a store need not wait for it.

        self._future: type[Future[None]] = Future
        self._jobs: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._running: list[Thread] = []
        for number in range(count):
            thread = Thread(target=self._work, name=f"holdfast-write_{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                break
            self._running.append(thread)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        future = self._future()
        if self._running:
            self._jobs.put((work, future))
        else:
            _carry_out(work, future)
        return future

    def stop(self) -> None:
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._running:
            self._jobs.put(None)
        for thread in self._running:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _carry_out(*job)


def _carry_out(work: Callable[[], None], future: Future[None]) -> None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - raised by whoever asks for the result
        future.set_exception(error)
    else:
        future.set_result(None)


def _windows() -> Iterator[memoryview]:
    """One for each thread, side by side."""
    memory = memoryview(huge_memory(NUM_THREADS * WINDOW_BYTES))
    for number in range(NUM_THREADS):
        yield memory[number * WINDOW_BYTES : (number + 1) * WINDOW_BYTES]


def huge_memory(nbytes: int) -> mmap.mmap:
    """So many bytes of memory of its own, on huge pages where there are any, which the disk takes
    in one piece. Begins on a page, and goes back to the system with its last reader."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _split(parts: list[memoryview], nbytes: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first so many bytes, and what follows them."""
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
    if len(view) < IN_PLACE_BYTES_MIN or offset % PAGE_BYTES:
        return False
    import numpy as np  # Not at the top: whoever only looks at a store need not wait for it.

    return np.frombuffer(view, np.uint8).ctypes.data % PAGE_BYTES == 0


def _gather(parts: Sequence[memoryview], window: memoryview) -> int:
    """Copy the parts to the window, one after the other. Returns their bytes."""
    import numpy as np

    at = 0
    for part in parts if len(parts) <= _FEW else [b"".join(parts)]:
        target = window[at : at + len(part)]
        # Lets other threads run meanwhile, which an assignment does not.
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(part, np.uint8))
        at += len(part)
    return at


def open_direct(path: str) -> int | None:
    """The file, to be written past the page cache; None where its file system cannot."""
    with suppress(OSError):
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    return None
