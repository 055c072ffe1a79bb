"""Raw reads and writes, syncs, and the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

WINDOW_BYTES = 8 << 20


def raw_write(path: Path, nbytes: int, window: mmap.mmap, threads: int = 2) -> None:
    """Write `nbytes` past the page cache, repeating `window`, and sync the file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    os.posix_fallocate(file, 0, nbytes)

    def write(offset: int) -> None:
        os.pwrite(file, memoryview(window)[: min(WINDOW_BYTES, nbytes - offset)], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(0, nbytes, WINDOW_BYTES)))
    os.fsync(file)
    os.close(file)


def raw_read(path: Path, targets: Sequence[memoryview], threads: int = 2) -> None:
    """Read consecutive ranges of a file into `targets`."""
    file, offset, jobs = os.open(path, os.O_RDONLY), 0, []
    with ThreadPoolExecutor(threads) as pool:
        for target in targets:
            jobs.append(pool.submit(os.preadv, file, [target], offset))
            offset += len(target)
    assert sum(job.result() for job in jobs) == offset
    os.close(file)


def raw_read_direct(path: Path, nbytes: int, threads: int = 2) -> None:
    """Read `nbytes` past the page cache and drop them: the speed of the disk alone."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    windows = [mmap.mmap(-1, WINDOW_BYTES) for _ in range(threads)]

    def read(thread: int) -> None:
        for offset in range(thread * WINDOW_BYTES, nbytes, threads * WINDOW_BYTES):
            os.preadv(file, [windows[thread]], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    os.close(file)


def random_window() -> mmap.mmap:
    """Return `WINDOW_BYTES` of page-aligned random bytes."""
    window = mmap.mmap(-1, WINDOW_BYTES)
    window.write(os.urandom(WINDOW_BYTES))
    return window


def sync(folder: Path) -> None:
    """Make everything below `folder` durable, four files at a time."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_sync, (*files_in(folder), folder)))


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def warm_cache(folder: Path) -> None:
    """Load all files below `folder` into the page cache, and check that they are there."""
    buffer = bytearray(WINDOW_BYTES)
    for _ in range(3):
        if (share := resident_share(folder)) == 1:
            return
        for path in files_in(folder):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    assert share > 0.99, f"{share:.1%} of {folder} is in the page cache"


def cool_cache(folder: Path) -> None:
    """Sync all files below `folder`, evict them from the page cache, and check that."""
    sync(folder)
    drop_cache(folder)
    share = resident_share(folder)
    assert share < 0.001, f"{share:.1%} of {folder} is still in the page cache"


def drop_cache(folder: Path) -> None:
    """Evict the synced files below `folder` from the page cache."""
    for path in files_in(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(folder: Path) -> float:
    """Return the share of the pages of all files below `folder` in the page cache (`mincore`)."""
    resident = total = 0
    for path in files_in(folder):
        nbytes = path.stat().st_size
        if not nbytes:
            continue
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY) as mapped,
        ):
            pages = np.empty(-(-nbytes // mmap.PAGESIZE), np.uint8)
            first = ctypes.c_char.from_buffer(mapped)
            failed = ctypes.CDLL(None, use_errno=True).mincore(
                ctypes.c_void_p(ctypes.addressof(first)),
                ctypes.c_size_t(nbytes),
                pages.ctypes.data_as(ctypes.c_void_p),
            )
            del first
            assert not failed, os.strerror(ctypes.get_errno())
        resident += int((pages & 1).sum())
        total += len(pages)
    return resident / total if total else 1.0


def files_in(folder: Path) -> list[Path]:
    """List all files below `folder`."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
