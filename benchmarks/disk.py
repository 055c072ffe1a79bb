"""Files: what the disk itself gives, what is synced, and what the page cache holds."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

WINDOW_BYTES = 8 << 20


def raw_write(path: Path, nbytes: int, source: mmap.mmap, threads: int = 2) -> None:
    """Write so many bytes past the page cache, the same window over and over, and sync them."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    os.posix_fallocate(file, 0, nbytes)

    def put(at: int) -> None:
        os.pwrite(file, memoryview(source)[: min(WINDOW_BYTES, nbytes - at)], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(put, range(0, nbytes, WINDOW_BYTES)))
    os.fsync(file)
    os.close(file)


def raw_read(path: Path, targets: Sequence[memoryview], threads: int = 2) -> None:
    """Read a file into these, one after the other."""
    file, at, jobs = os.open(path, os.O_RDONLY), 0, []
    with ThreadPoolExecutor(threads) as pool:
        for target in targets:
            jobs.append(pool.submit(os.preadv, file, [target], at))
            at += len(target)
    assert sum(job.result() for job in jobs) == at
    os.close(file)


def raw_read_direct(path: Path, nbytes: int, threads: int = 2) -> None:
    """Read so many bytes past the page cache, and drop them: all that the disk gives."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    windows = [mmap.mmap(-1, WINDOW_BYTES) for _ in range(threads)]

    def get(first: int) -> None:
        for at in range(first * WINDOW_BYTES, nbytes, threads * WINDOW_BYTES):
            os.preadv(file, [windows[first]], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(get, range(threads)))
    os.close(file)


def random_window() -> mmap.mmap:
    """Page-aligned memory of random bytes."""
    window = mmap.mmap(-1, WINDOW_BYTES)
    window.write(os.urandom(WINDOW_BYTES))
    return window


def sync(folder: Path) -> None:
    """Make everything below it durable, several files at a time."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_sync, (*files_in(folder), folder)))


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def recall(folder: Path) -> None:
    """Bring all files below it into the page cache, and make sure that they are there."""
    buffer = bytearray(WINDOW_BYTES)
    for _ in range(3):
        if (share := resident_share(folder)) == 1:
            return
        for path in files_in(folder):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    assert share > 0.99, f"{share:.1%} of {folder} is in the page cache"


def forget(folder: Path) -> None:
    """Sync all files below it, take them out of the page cache, and make sure that they are."""
    sync(folder)
    let_go(folder)
    share = resident_share(folder)
    assert share < 0.001, f"{share:.1%} of {folder} is still in the page cache"


def let_go(folder: Path) -> None:
    """Leave the room in the page cache that synced files below it take to others."""
    for path in files_in(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(folder: Path) -> float:
    """Which part of the pages of all files below it the page cache holds, by `mincore`."""
    held = total = 0
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
        held += int((pages & 1).sum())
        total += len(pages)
    return held / total if total else 1.0


def files_in(folder: Path) -> list[Path]:
    """All of them, however deep."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
