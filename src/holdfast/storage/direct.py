"""Writing a file past the page cache: at the disk's own speed, and nothing that training has cached
makes way for a checkpoint."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

from holdfast.storage.store import Buffer

PAGE_BYTES = 4096
"""Offsets, lengths and addresses of direct writes are multiples of this, on every disk so far."""

WINDOW_BYTES = 8 << 20
"""Written at once where parts are small."""

NUM_WINDOWS = 3
"""One is filled while two are on their way: what a writer holds in memory."""

NUM_THREADS = 2

IN_PLACE_BYTES_MIN = 1 << 20
"""A part that is as large, and lies on pages as its place in the file does, is written from where
it is."""

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
    """Writes whole pages past the page cache, in threads; what is left at the ends of ranges goes
    through it. Fastest where each range begins where the last one ended."""

    def __init__(self, direct: int, buffered: int) -> None:
        """`direct` and `buffered` are the same file, opened with `O_DIRECT` and without."""
        self._direct = direct
        self._edges = BufferedWriter(buffered)
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="holdfast-write")
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._num_made = 0
        self._writing: list[Future[None]] = []
        self._window: memoryview | None = None
        self._start = self._stop = 0
        """What of the file the window holds; `_start` is that of a page."""

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        for part in parts:
            view = memoryview(part).cast("B")
            if len(view):
                self._put(offset, view)
            offset += len(view)

    def finish(self) -> None:
        """All has been handed over: wait until it is written."""
        self._leave()
        for done in self._writing:
            done.result()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _put(self, offset: int, view: memoryview) -> None:
        if offset != self._stop or (self._window is None and offset % PAGE_BYTES):
            self._leave()
            edge = min(-offset % PAGE_BYTES, len(view))
            self._edges.write(offset, [view[:edge]])
            offset, view = offset + edge, view[edge:]
            self._start = self._stop = offset
        if self._fits_in_place(view, offset):
            self._flush()
            pages = len(view) // PAGE_BYTES * PAGE_BYTES
            self._writing.append(self._pool.submit(self._pwrite, view[:pages], offset, None))
            view = view[pages:]
            self._start = self._stop = offset + pages
        while len(view):
            if self._window is None:
                self._window = self._fresh()
            at = self._stop - self._start
            taken = view[: WINDOW_BYTES - at]
            _copy(self._window[at : at + len(taken)], taken)
            self._stop += len(taken)
            view = view[len(taken) :]
            if self._stop - self._start == WINDOW_BYTES:
                self._flush()

    def _fits_in_place(self, view: memoryview, offset: int) -> bool:
        if len(view) < IN_PLACE_BYTES_MIN or offset % PAGE_BYTES:
            return False
        import numpy as np  # Not at the top: whoever only looks at a store need not wait for it.

        return np.frombuffer(view, np.uint8).ctypes.data % PAGE_BYTES == 0

    def _flush(self) -> None:
        """Send the whole pages of the window on their way; the rest begins the next one."""
        if self._window is None:
            return
        pages = (self._stop - self._start) // PAGE_BYTES * PAGE_BYTES
        rest = bytes(self._window[pages : self._stop - self._start])
        window, self._window = self._window, None
        if pages:
            self._writing.append(
                self._pool.submit(self._pwrite, window[:pages], self._start, window)
            )
        else:
            self._free.put(window)
        self._start += pages
        if rest:
            self._window = self._fresh()
            self._window[: len(rest)] = rest

    def _leave(self) -> None:
        """The next range begins elsewhere."""
        self._flush()
        if self._window is not None:
            self._edges.write(self._start, [self._window[: self._stop - self._start]])
            self._free.put(self._window)
            self._window = None

    def _fresh(self) -> memoryview:
        """A window to fill. Raises the error of a write that failed."""
        for done in [done for done in self._writing if done.done()]:
            self._writing.remove(done)
            done.result()
        if self._num_made < NUM_WINDOWS and self._free.empty():
            self._num_made += 1
            # Anonymous memory begins on a page.
            return memoryview(mmap.mmap(-1, WINDOW_BYTES))
        return self._free.get()

    def _pwrite(self, view: memoryview, offset: int, window: memoryview | None) -> None:
        try:
            while len(view):
                count = os.pwrite(self._direct, view, offset)
                view, offset = view[count:], offset + count
        finally:
            if window is not None:
                self._free.put(window)


def _copy(target: memoryview, source: memoryview) -> None:
    if len(source) < PAGE_BYTES:
        target[:] = source
    else:
        import numpy as np

        # Lets other threads run meanwhile, which an assignment does not.
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def open_direct(path: str) -> int | None:
    """The file, to be written past the page cache; None where its file system cannot."""
    with suppress(OSError):
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    return None
