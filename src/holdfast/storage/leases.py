"""Leases: locks on file systems without flock(2), such as Lustre mounted with `noflock`.

A lease is a file. Its holder renews the lease by setting the file's modification time, by the clock
of the file system. A lease that has not been renewed for `LEASE_S` has lapsed, and another process
may take it. To take the lease NAME, a process creates the file `NAME.taking`, which only one
process can do. It then checks the lease once more, and renames `NAME.taking` to NAME.

A flock ends with its process, but a lease does not. If a run was killed on another machine, its
restart waits until the lease lapses. The lease names its process, so a restart does not wait for a
process of this machine that has ended. A holder that was suspended may have lost its lease, so a
holder checks its lease before each change (`Lease.is_at`).
"""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import suppress

from holdfast.format.names import TAKING
from holdfast.storage.forks import no_fork_between
from holdfast.storage.held import HeldFile
from holdfast.storage.plain import open_plain
from holdfast.storage.processes import runs, this_process

UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of flock on file systems that have no locks."""

LEASE_S = 30.0
"""Seconds from the last renewal of a lease until the lease lapses."""

RENEW_S = 5.0
"""Seconds between renewals."""

SKEW_S = 60.0
"""Largest expected difference, in seconds, between the clocks of this host and the file system."""

MARKER = "\nlease\n"
"""Last bytes of a lease. A lock file without them is free."""

CONTENT_BYTES_MAX = 1024
"""Maximum size of a lock file."""

_PROCESS = "process "
"""Start of the line of a lease that names its holder, the last line but one."""


class Lease:
    """A lease of this process on a file, until `release` or until it lapses.

    Has the methods of `locks.Lock`.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        """`descriptor`: open file that this process has just renamed to `path`."""
        self._path, self._held = path, HeldFile(descriptor)
        self._released = threading.Event()
        threading.Thread(target=self._renew, name="holdfast-lease", daemon=True).start()

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lease. False after `release`, and in a forked child."""
        return self._held.is_held

    def is_at(self, path: str) -> bool:
        """Renew the lease. Return whether its file still has this path."""
        self._touch()
        return self._held.is_at(path)

    def write_note(self, note: str) -> None:
        """Replace the note in the file. Does nothing if the lease is released."""
        if self.is_held:
            _write(self._held.descriptor, note)

    def release(self) -> None:
        """Delete the file. Does nothing if the lease is released already, or in a forked child."""
        if self.is_held:
            self._released.set()
            descriptor = self._held.give_up()
            with suppress(OSError):
                if self._held.is_at(self._path):
                    os.unlink(self._path)
            os.close(descriptor)

    def release_and_remove(self, path: str) -> None:
        """Release the lease, and delete its file at `path`. Does nothing in a forked child."""
        self._path = path
        self.release()

    def _touch(self) -> None:
        # The file system may fail for a moment. If it keeps failing, the lease lapses.
        with suppress(OSError):
            os.utime(self._held.descriptor)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            self._touch()


def take_lease(path: str, *, waits: bool) -> Lease | None:
    """Take the lease at `path`. Return None if another process holds it.

    If the holder was a process of this machine and has ended, the lease is free. `waits`: wait for
    the lease of another process until it lapses, or until its holder renews it.

    Raises:
        OSError: the file cannot be written.
    """
    deadline = time.monotonic() + LEASE_S + RENEW_S
    first = _renewed_at(path)
    while True:
        lease = _try_to_take(path)
        if lease is not None or not waits:
            return lease
        if _renewed_at(path) != first or time.monotonic() >= deadline:
            return None
        time.sleep(min(0.2, RENEW_S / 4))


def is_lease(content: str) -> bool:
    """Return whether a lock file with this content is a lease."""
    return content.endswith(MARKER)


def note_in(content: str) -> str:
    """Return the holder's note in the content of a lock file."""
    return _note_and_process(content)[0].strip()


def has_ended(path: str, content: str) -> bool:
    """Return whether the lease at `path` is free: it has lapsed, by the clock of this host, or its
    holder was a process of this machine that has ended."""
    renewed_at = _renewed_at(path)
    has_lapsed = renewed_at is None or time.time() - renewed_at > LEASE_S + SKEW_S
    return has_lapsed or runs(_note_and_process(content)[1]) is False


def _note_and_process(content: str) -> tuple[str, str]:
    body = content.removesuffix(MARKER)
    note, _, process = body.rpartition("\n")
    if is_lease(content) and process.startswith(_PROCESS):
        return note, process.removeprefix(_PROCESS)
    return body, ""


def _try_to_take(path: str) -> Lease | None:
    taking = path + TAKING
    with no_fork_between():
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(taking, flags, 0o666)
        except FileExistsError:
            _remove_left_behind(taking)
            return None
        try:
            _write(descriptor, "")
            os.fsync(descriptor)
            if _is_taken(path, now=os.fstat(descriptor).st_mtime):
                os.unlink(taking)
                os.close(descriptor)
                return None
            os.rename(taking, path)
            lease = Lease(path, descriptor)
        except BaseException:
            with suppress(OSError):
                os.unlink(taking)
            with suppress(OSError):
                os.close(descriptor)
            raise
    return lease


def _is_taken(path: str, *, now: float) -> bool:
    """Return whether another process holds the lease at `path`. `now`: current time by the clock of
    the file system."""
    renewed_at = _renewed_at(path)
    if renewed_at is None or now - renewed_at > LEASE_S:
        return False
    with suppress(FileNotFoundError):
        descriptor = open_plain(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            content = os.pread(descriptor, CONTENT_BYTES_MAX, 0).decode(errors="replace")
            return is_lease(content) and runs(_note_and_process(content)[1]) is not False
        finally:
            os.close(descriptor)
    return False


def _remove_left_behind(taking: str) -> None:
    """Delete the file `NAME.taking` if it is so old that its process must have died while it took
    the lease."""
    with suppress(OSError):
        if time.time() - os.lstat(taking).st_mtime > LEASE_S + SKEW_S:
            os.unlink(taking)


def _write(descriptor: int, note: str) -> None:
    end = f"\n{_PROCESS}{this_process()}{MARKER}".encode()
    data = note.encode(errors="replace")[: CONTENT_BYTES_MAX - len(end)] + end
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))


def _renewed_at(path: str) -> float | None:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return None
