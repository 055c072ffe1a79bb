"""Lock files and folders with flock(2). Where there is no flock, lock files with leases.

A flock belongs to an open file, and ends when the last copy of the file's descriptor is closed. So
it ends with the process, however the process ends, if forked children close their copies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from holdfast.errors import StorageError
from holdfast.storage import leases
from holdfast.storage.forks import leavers, no_fork_between
from holdfast.storage.held import HeldFile, file_at
from holdfast.storage.leases import CONTENT_BYTES_MAX, Lease, take_lease
from holdfast.storage.plain import kind_of

_TRIES = 100
"""Maximum number of tries to lock a file. A try fails only if another process removed the file
meanwhile."""

_LOCKS = Path("/proc/locks")

_HOLDER = re.compile(r"host (\S+), pid (\d+)")
"""Pattern of the part of a note that names the holder of a lock."""


class Lock:
    """A lock of this process on a file or folder, until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._held = HeldFile(descriptor)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock. False after `release`, and in a forked child."""
        return self._held.is_held

    def is_at(self, path: str) -> bool:
        """Return whether the locked file still has this path."""
        return self._held.is_at(path)

    def write_note(self, note: str) -> None:
        """Replace the content of the file by `note`. Does nothing if the lock is released."""
        if self.is_held:
            data = note.encode(errors="replace")[:CONTENT_BYTES_MAX]
            os.pwrite(self._held.descriptor, data, 0)
            os.ftruncate(self._held.descriptor, len(data))

    def release(self) -> None:
        """Unlock the file. Does nothing if it is unlocked already, or in a forked child."""
        if self.is_held:
            descriptor = self._held.give_up()
            # `close` alone does not unlock the file while a child that native code has forked still
            # has it open.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def release_and_remove(self, path: str) -> None:
        """Delete the lock file, then unlock. Does nothing in a forked child."""
        if self.is_held:
            with suppress(FileNotFoundError):
                os.unlink(path)
            self.release()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # When the interpreter ends, the globals of this module may be gone. The operating system
        # then unlocks the file anyway. A constructor that was interrupted has set no `_held`.
        if not is_finalizing() and hasattr(self, "_held"):
            with suppress(OSError):
                self.release()


AnyLock = Lock | Lease


def lock_file(path: str, *, waits: bool = False) -> AnyLock | None:
    """Lock a plain file, and create it first if needed. Return None if it is locked already.

    On a file system without flock, take a lease. `waits`: wait for the lease of another process,
    which may have been killed, until the lease lapses.

    Raises:
        StorageError: `path` is a link, a folder, a pipe or a device.
        OSError: the file cannot be opened or locked.
    """
    try:
        return _flock_file(path)
    except OSError as error:
        if error.errno not in leases.UNSUPPORTED:
            raise
    if is_held_here(path):
        return None
    return take_lease(path, waits=waits)


def _flock_file(path: str) -> Lock | None:
    for _ in range(_TRIES):
        with no_fork_between():
            descriptor = _open_lock_file(path)
            lock = _locked(descriptor)
        if lock is None:
            return None
        if not lock.is_at(path):
            # The last holder of the lock removed the file after it was opened here.
            lock.release()
        elif os.fstat(descriptor).st_nlink > 1:
            # The file has a second name, by a hard link, so it may be a user's file: do not write a
            # note to it.
            os.unlink(path)
            lock.release()
        else:
            return lock
    raise StorageError(f"`{path}` is replaced faster than it can be locked")


def lock_folder(path: str) -> Lock | None:
    """Lock a folder or a file. The lock survives renames. Return None if it is locked already.

    Raises:
        FileNotFoundError: nothing is at `path`, or it was renamed before it could be locked.
        OSError: the file system cannot lock what is at `path`.
    """
    with no_fork_between():
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = _locked(os.open(path, flags))
    if lock is not None and not lock.is_at(path):
        lock.release()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return lock


def is_held_here(path: str) -> bool:
    """Return whether this process holds the lock on the file at `path`."""
    files = (one for one in leavers() if isinstance(one, HeldFile) and one.is_held)
    return any(file.is_at(path) for file in files)


def holder_of(path: str) -> str | None:
    """Return the note of the process that has locked `path`; None if no such process is known.

    Reads `/proc/locks`. If it tried to lock the file, a run that starts at this moment could fail.
    It therefore finds only locks of this machine, but leases of any machine.
    """
    file = file_at(path)
    if file is None:
        return None
    content = _content(path)
    if leases.is_lease(content):
        return None if leases.has_ended(path, content) else leases.note_in(content)
    device = f"{os.major(file[0]):02x}:{os.minor(file[0]):02x}:{file[1]}"
    try:
        # One lock per line: number, FLOCK, ADVISORY, WRITE, process, device and inode, range.
        rows = [line.split() for line in _LOCKS.read_text().splitlines()]
    except OSError:
        return None
    if not any("FLOCK" in row and device in row for row in rows):
        return None
    return read_note(path)


def read_note(path: str) -> str:
    """Return the note in a lock file; empty if the file has no note, or is not a plain file."""
    return leases.note_in(_content(path))


def _content(path: str) -> str:
    with suppress(OSError, StorageError):
        descriptor = _open_lock_file(path, os.O_RDONLY)
        try:
            note = os.pread(descriptor, CONTENT_BYTES_MAX, 0)
        finally:
            os.close(descriptor)
        return note.decode(errors="replace")
    return ""


def has_ended(path: str) -> bool:
    """Return whether the process that has locked `path` was one of this host and has ended. False
    for a lease, since forked children do not keep leases."""
    content = _content(path)
    holder = _HOLDER.search(content)
    if leases.is_lease(content) or holder is None or holder[1] != os.uname().nodename:
        return False
    try:
        os.kill(int(holder[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def processes_with(path: str) -> list[int]:
    """Return the PIDs of processes that have `path` open, if this user may inspect them."""
    file = file_at(path)
    processes = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    opened = descriptor.stat()
                    if (opened.st_dev, opened.st_ino) == file:
                        processes.add(int(process.name))
    return sorted(processes)


def _open_lock_file(path: str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a lock file. Refuses links, since writing a note would overwrite the link's target."""
    more = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | more, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _not_plain(path, os.lstat(path).st_mode) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_plain(path, mode)
    return descriptor


def _not_plain(path: str, mode: int) -> StorageError:
    return StorageError(
        f"`{path}` is {kind_of(mode)}, but a lock must be a plain file",
        hint=f"check what it is, then move it away: mv {path} {path}.old",
    )


def _locked(descriptor: int) -> Lock | None:
    """Lock an open file. If the file is locked already, close it and return None."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock = Lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return lock
