"""Host memory for snapshots: how much is free, and how it is allocated."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from holdfast.accelerator import PageLock, can_lock, locked_memory
from holdfast.errors import UsageError
from holdfast.spelling import spelled_bytes
from holdfast.storage.direct import huge_memory

TOUCH_THREADS_MAX = 8
"""Most threads that write to new pages, so that the system allocates them. More threads are no
faster."""

_PAGE_BYTES = 4096

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def check_own_memory(nbytes: int) -> None:
    """Check that the host has room for a snapshot of `nbytes`. Raises a UsageError if not."""
    free = free_memory()
    if free is not None and nbytes > free:
        raise UsageError(
            f"saving in the background needs {spelled_bytes(nbytes)} of host memory on this rank "
            f"for a snapshot, {spelled_bytes(free)} are free",
        )


def check_memory(nbytes: int, others: Sequence[int]) -> None:
    """Check that the host has room for `nbytes` of this rank, and for `others`: the bytes that each
    other rank on the host needs at the same time. Raises a UsageError if not."""
    free, total = free_memory(), nbytes + sum(others)
    num_ranks = 1 + len(others)
    if num_ranks > 1 and free is not None and total > free:
        raise UsageError(
            f"saving in the background needs {spelled_bytes(total)} of host memory for the "
            f"snapshots of the {num_ranks} ranks on this host, {spelled_bytes(free)} are free",
        )


def free_memory() -> int | None:
    """Return how many bytes of host memory this process can use without swapping, within the limits
    of its cgroups. Return None if the system does not say."""
    free = [*_free_on_host(), *_free_in_cgroups()]
    return max(0, min(free)) if free else None


class HostMemory:
    """Page-aligned memory of a snapshot, in huge pages if available."""

    def __init__(
        self, nbytes: int = 0, devices: Sequence[torch.device] = (), threads: int = 1
    ) -> None:
        """`devices`: accelerators that hold tensors of the snapshot. If there are any, the memory
        is page-locked. `threads`: number of threads that write to the new pages, so that the system
        allocates them before the lock. The allocation takes longer than the lock itself.

        Raises:
            UsageError: the pages cannot be locked.
        """
        self.is_locked: bool = bool(devices)
        self._lock: PageLock | None = None
        if devices and not can_lock(devices):
            locked = locked_memory(nbytes + _PAGE_BYTES)
            self.bytes: torch.Tensor = locked[-locked.data_ptr() % _PAGE_BYTES :][:nbytes]
            return
        if not nbytes:
            self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
            return
        memory = huge_memory(nbytes)
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
        if devices:
            # After a fork, the first process to write to a page gets a copy of the page, but the
            # device still writes to the original. So exclude the memory from children of a fork,
            # which do not need a snapshot.
            memory.madvise(mmap.MADV_DONTFORK)
            _touch(self.bytes, threads)
            self._lock = PageLock(self.bytes, devices[0])

    def release(self) -> None:
        """End the page lock and free the memory. Call this before other memory is allocated."""
        if self._lock is not None:
            self._lock.release()
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")


def threads_to_touch(num_local: int) -> int:
    """Return the number of threads per rank that write to new pages, for `num_local` ranks on this
    host."""
    return max(1, min(TOUCH_THREADS_MAX, len(os.sched_getaffinity(0)) // num_local))


def _touch(memory: torch.Tensor, threads: int) -> None:
    """Write to every page, so that the system allocates all pages now."""
    pages = memory[::_PAGE_BYTES]
    share = -(-len(pages) // threads)
    parts = [pages[start : start + share] for start in range(0, len(pages), share)]
    with ThreadPoolExecutor(threads, "holdfast-memory") as pool:
        # Each thread has a contiguous part. The threads run in parallel: `zero_` releases the GIL.
        list(pool.map(torch.Tensor.zero_, parts))


def _free_on_host() -> Iterator[int]:
    with suppress(OSError, KeyError):
        lines = MEMINFO.read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        yield int(fields["MemAvailable"].split()[0]) * 1024


def _free_in_cgroups() -> Iterator[int]:
    """Yield the bytes that each cgroup of this process has left. The page cache counts as free,
    since the system can take it back."""
    # With cgroups of version 2, the file has one line, `0::/path`; with version 1, a line per
    # controller.
    with suppress(OSError, ValueError):
        for line in CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            names = ("memory.max", "memory.current", "inactive_file")
            root = CGROUPS
            if "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                root = CGROUPS / "memory"
            elif controllers:
                continue
            group = root / path.lstrip("/")
            # A parent's limit holds for its children too. In a Docker container, the path may be
            # valid on the host only. Then the files in the root folder are the container's.
            parents = [folder for folder in group.parents if folder.is_relative_to(root)]
            for folder in {group, root, *parents}:
                yield from _free_in(folder, names)


def _free_in(folder: Path, names: tuple[str, str, str]) -> Iterator[int]:
    limit, used, cache = names
    with suppress(OSError, ValueError, KeyError):
        # If there is no limit, the file of version 2 says `max`: `int` raises ValueError, and
        # nothing is yielded.
        total = int((folder / limit).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield total - int((folder / used).read_text()) + int(stat[cache])
