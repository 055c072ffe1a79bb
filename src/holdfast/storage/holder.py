"""Who holds a lock in a folder of this machine."""

from __future__ import annotations

import os
from pathlib import Path

from holdfast.storage.local import LocalStore

_LOCKS = Path("/proc/locks")


def holder_of(store: LocalStore, key: str) -> str | None:
    """The note of whoever on this machine holds `key`; None where nobody does. Does not take hold
    itself, so that no run is refused because somebody has looked."""
    found = Path(store.url, key).stat()
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    locked = f"{device}:{found.st_ino}"
    # A line a lock: number, FLOCK, ADVISORY, WRITE, process, device and inode, range.
    rows = (line.split() for line in _LOCKS.read_text().splitlines())
    if not any("FLOCK" in row and locked in row for row in rows):
        return None
    return store.read(key, 0, 1024).decode(errors="replace").strip()
