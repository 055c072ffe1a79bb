"""Syncs, and the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

WINDOW_BYTES = 8 << 20


def sync(folder: Path) -> None:
    """Make everything below `folder` durable, four files at a time."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_sync, (*files_in(folder), folder)))


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def warm_cache(folder: Path) -> None:
    """Load all files below `folder` into the page cache, and check that they are there.

    Reads them twice: the second read marks the pages as used, which takes time only once.
    """
    if resident_share(folder) == 1:
        return
    buffer = bytearray(WINDOW_BYTES)
    for path in files_in(folder) * 2:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    share = resident_share(folder)
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
