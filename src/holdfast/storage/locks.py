"""Locks of this process on files and folders of this machine.

A lock of flock(2) belongs to the open file. The system releases it with the last copy of that file,
so it ends with the process however that ends, provided that forked children give their copies up.
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
from holdfast.storage.forks import leave_in_children, leavers, no_fork_between
from holdfast.storage.plain import kind_of

NOTE_BYTES_MAX = 1024

_TRIES = 100
"""Whoever removes a lock file does so at most once a lock, so each try meets another process."""

_LOCKS = Path("/proc/locks")

_HOLDER = re.compile(r"host (\S+), pid (\d+)")
"""Part of the note of a lock that tells whose it is."""


class Lock:
    """A file or folder that this process has locked, until `release` or until the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pid = os.getpid()
        found = os.fstat(descriptor)
        self.file = (found.st_dev, found.st_ino)
        """Device and inode."""

    @property
    def mine(self) -> bool:
        """Whether this process holds it: false once released, and in a forked child."""
        return self._descriptor >= 0 and self._pid == os.getpid()

    def is_at(self, path: str) -> bool:
        """Whether `path` still leads to the file that is locked."""
        return self.file == _file_at(path)

    def write_note(self, note: str) -> None:
        """Make `note` the content of the file. Does nothing where the lock is not `mine`."""
        if self.mine:
            data = note.encode(errors="replace")[:NOTE_BYTES_MAX]
            os.pwrite(self._descriptor, data, 0)
            os.ftruncate(self._descriptor, len(data))

    def release(self) -> None:
        """Unlock. Further calls do nothing, and neither do those of a forked child."""
        if self.mine:
            descriptor, self._descriptor = self._descriptor, -1
            # Explicitly, since a child whose fork Python did not see may keep the file open.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def leave(self) -> None:
        """As `holdfast.storage.forks.Leaver`: close the copy, which leaves the parent's lock."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # When the interpreter ends, the globals of this module are gone, and the system unlocks.
        if not is_finalizing():
            with suppress(OSError):
                self.release()


def lock_file(path: str) -> Lock | None:
    """Lock a plain file, which is made where there is none. None where another lock is on it.

    Raises:
        StorageError: it is a link, a folder, a pipe or a device.
        OSError: it cannot be opened or locked.
    """
    for _ in range(_TRIES):
        with no_fork_between():
            descriptor = _open_lock_file(path)
            lock = _locked(descriptor)
        if lock is None:
            return None
        found = os.fstat(descriptor)
        if not lock.is_at(path):
            # Its last holder removed the file after it was opened here.
            lock.release()
        elif found.st_nlink > 1:
            # Another name of it may be somebody's own file, which a note would overwrite.
            os.unlink(path)
            lock.release()
        else:
            return lock
    raise StorageError(f"`{path}` is replaced faster than it can be locked")


def lock_folder(path: str) -> Lock | None:
    """Lock a folder, or a file, whatever it is renamed to. None where another lock is on it.

    Raises:
        FileNotFoundError: it is gone, or was renamed before it could be locked.
        OSError: the file system cannot lock it.
    """
    with no_fork_between():
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = _locked(os.open(path, flags))
    if lock is not None and not lock.is_at(path):
        lock.release()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return lock


def remove_lock_file(path: str, lock: Lock) -> None:
    """Delete the file of a lock, then release it."""
    if lock.mine:
        with suppress(FileNotFoundError):
            os.unlink(path)
        lock.release()


def is_held_here(path: str) -> bool:
    """Whether this process holds the lock on the file at `path`."""
    file = _file_at(path)
    return any(isinstance(one, Lock) and one.mine and one.file == file for one in leavers())


def holder_of(path: str) -> str | None:
    """Note of whoever on this machine holds the lock on the file at `path`; None where nobody does.

    Does not lock, so that no run is refused because somebody has looked.
    """
    file = _file_at(path)
    if file is None:
        return None
    device = f"{os.major(file[0]):02x}:{os.minor(file[0]):02x}:{file[1]}"
    try:
        # A line a lock: number, FLOCK, ADVISORY, WRITE, process, device and inode, range.
        rows = [line.split() for line in _LOCKS.read_text().splitlines()]
    except OSError:
        return None
    if not any("FLOCK" in row and device in row for row in rows):
        return None
    return read_note(path)


def read_note(path: str) -> str:
    """Note in a lock file; empty where there is none, or where the file is not a plain one."""
    with suppress(OSError):
        descriptor = _open_lock_file(path, os.O_RDONLY)
        try:
            note = os.pread(descriptor, NOTE_BYTES_MAX, 0)
        finally:
            os.close(descriptor)
        return note.decode(errors="replace").strip()
    return ""


def has_ended(note: str) -> bool:
    """Whether `note` names a process of this host that has ended."""
    found = _HOLDER.search(note)
    if found is None or found[1] != os.uname().nodename:
        return False
    try:
        os.kill(int(found[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def processes_with(path: str) -> list[int]:
    """Processes that have the file at `path` open, as far as this user may look."""
    file = _file_at(path)
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    opened = descriptor.stat()
                    if (opened.st_dev, opened.st_ino) == file:
                        found.add(int(process.name))
    return sorted(found)


def _open_lock_file(path: str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open the file of a lock, never through a link, which could lead to anybody's file."""
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
        f"`{path}` is {kind_of(mode)}, and a lock is a plain file",
        hint=f"look at what it is, then move it away: mv {path} {path}.old",
    )


def _locked(descriptor: int) -> Lock | None:
    """The lock on an open file; None where another is on it, and the file is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock = Lock(descriptor)
        leave_in_children(lock)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return lock


def _file_at(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
