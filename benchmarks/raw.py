"""Raw writes and reads of the bytes of a state, in the fastest of several ways."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch.distributed as dist

from benchmarks.meter import measure, measure_ranks

MIB = 1 << 20
WINDOW_BYTES_MAX = 32 * MIB


@dataclass(frozen=True, slots=True)
class Way:
    """Number of threads of a process, and the bytes of each call."""

    threads: int = 2
    window_bytes: int = 8 * MIB

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{threads}, windows of {self.window_bytes // MIB} MiB"


WAYS = tuple(Way(threads, mib * MIB) for threads in (1, 2, 4) for mib in (1, 8, 32))


@dataclass(frozen=True, slots=True)
class Ways:
    """Way of each kind of raw work."""

    write: Way = Way()
    write_memory: Way = Way()
    read: Way = Way()
    read_direct: Way = Way()


def fastest(run: Callable[[Way], object], prepare: Callable[[], object], rounds: int = 2) -> Way:
    """Return the way of `WAYS` with the least time in any of the rounds. Collective.

    `prepare` runs before each measurement, on all ranks.
    """
    meter = measure_ranks if dist.is_initialized() else measure
    seconds = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for way in WAYS:
            prepare()
            seconds[way] = min(seconds[way], meter(lambda way=way: run(way))["seconds"])  # type: ignore[misc]
    return min(seconds, key=seconds.__getitem__)


def raw_write(path: Path, nbytes: int, way: Way) -> None:
    """Write `nbytes` random bytes past the page cache, and sync the file. All come from one buffer,
    which stays in the CPU cache."""
    nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    buffer = memoryview(_window())
    offsets = range(0, nbytes, way.window_bytes)
    _write_all(path, [(o, buffer[: min(way.window_bytes, nbytes - o)]) for o in offsets], way)


def raw_write_memory(path: Path, memory: Sequence[memoryview], way: Way) -> None:
    """Write all pages that hold these bytes past the page cache, and sync the file. The pages are
    written from where they are in memory."""
    windows, offset = [], 0
    for part in memory:
        address = np.frombuffer(part, np.uint8).ctypes.data
        first = address // mmap.PAGESIZE * mmap.PAGESIZE
        stop = -(-(address + len(part)) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = memoryview((ctypes.c_char * (stop - first)).from_address(first))
        for start in range(0, len(pages), way.window_bytes):
            windows.append((offset + start, pages[start : start + way.window_bytes]))
        offset += len(pages)
    _write_all(path, windows, way)


def _write_all(path: Path, windows: Sequence[tuple[int, memoryview]], way: Way) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    offset, last = windows[-1]
    os.posix_fallocate(file, 0, offset + len(last))

    def write(window: tuple[int, memoryview]) -> int:
        return os.pwrite(file, window[1], window[0])

    with ThreadPoolExecutor(way.threads) as pool:
        assert sum(pool.map(write, windows)) == offset + len(last)
    os.fsync(file)
    os.close(file)


def raw_read(path: Path, targets: Sequence[memoryview], way: Way) -> None:
    """Read consecutive ranges of a file into `targets`."""
    file = os.open(path, os.O_RDONLY)

    def pieces() -> Iterator[tuple[memoryview, int]]:
        offset = 0
        for target in targets:
            for start in range(0, len(target), way.window_bytes):
                piece = target[start : start + way.window_bytes]
                yield piece, offset + start
            offset += len(target)

    with ThreadPoolExecutor(way.threads) as pool:
        jobs = [pool.submit(os.preadv, file, [piece], offset) for piece, offset in pieces()]
    assert sum(job.result() for job in jobs) == sum(map(len, targets))
    os.close(file)


def raw_read_direct(path: Path, nbytes: int, way: Way) -> None:
    """Read `nbytes` past the page cache and drop them: the speed of the disk alone."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    windows = [mmap.mmap(-1, way.window_bytes) for _ in range(way.threads)]

    def read(thread: int) -> None:
        first, stride = thread * way.window_bytes, way.threads * way.window_bytes
        for offset in range(first, nbytes, stride):
            os.preadv(file, [windows[thread]], offset)

    with ThreadPoolExecutor(way.threads) as pool:
        list(pool.map(read, range(way.threads)))
    os.close(file)


@cache
def _window() -> mmap.mmap:
    """Page-aligned random bytes."""
    window = mmap.mmap(-1, WINDOW_BYTES_MAX)
    window.write(os.urandom(WINDOW_BYTES_MAX))
    return window
