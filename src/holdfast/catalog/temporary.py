"""Local folders for the files of a checkpoint that is in an object store.

Another program writes the files there before they are uploaded, or reads them there after they were
fetched. A process locks its folders. It deletes folders that no process has locked, since killed
processes have left them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from holdfast.errors import StorageError

ROOM = "set TMPDIR to a folder with room for a checkpoint"
"""Hint for errors of files in temporary folders."""

_OTHER_HOST_S = 7 * 86400
"""Age in seconds from which a folder of another host is deleted."""

_TRIES = 100
"""Maximum number of folders to try. Another process may delete a new one before it is locked."""


@dataclass(frozen=True, slots=True)
class TemporaryFolder:
    """A folder that this process has locked."""

    path: Path
    lock: list[int]
    """Open descriptor of the folder, which holds the lock; empty once the folder is deleted."""

    @classmethod
    def make(cls, above: Path | None = None, *, hint: str = ROOM) -> Self:
        """Make an empty folder, and delete the folders beside it that killed processes have left.

        `above`: folder to make it in; by default the folder for temporary files, which the
        environment variable TMPDIR names. `hint`: next step if no folder can be made.

        Raises:
            StorageError: no folder can be made there.
        """
        above = Path(tempfile.gettempdir()) if above is None else above
        with _storage_errors(above, hint):
            above.mkdir(parents=True, exist_ok=True)
            _clean_up(above)
            for _ in range(_TRIES):
                path = Path(tempfile.mkdtemp(prefix=_prefix(_host()), dir=above))
                lock = _locked(path)
                if lock is not None:
                    return cls(path, [lock])
        raise StorageError(f"other processes deleted all {_TRIES} new folders in `{above}`")

    def delete(self) -> None:
        """Delete the folder and the files in it. May be called twice."""
        if self.lock:
            # Errors are ignored: nobody needs the files, and the next `make` deletes the rest.
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self.lock.pop())


@contextmanager
def _storage_errors(above: Path, hint: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot make a folder in `{above}`: {error.strerror or error}",
            hint=hint,
        ) from error


def _prefix(host: str) -> str:
    """Return the start of the names of this user's folders on a host. Several hosts may share the
    folder for temporary files, and not see each other's locks."""
    return f".holdfast-{os.getuid()}-{host}-"


def _locked(path: Path, *, surely: bool = False) -> int | None:
    """Lock a folder, and return its descriptor; None if another process has locked or deleted it.

    `surely`: also return None if the file system has no locks. Then nobody knows whether a process
    uses the folder.
    """
    try:
        opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except BlockingIOError:
        is_ours = False
    except OSError:
        is_ours = not surely
    if is_ours and path.exists():
        return opened
    os.close(opened)
    return None


def _clean_up(above: Path) -> None:
    """Delete the folders of killed processes of this user: those of this host, and old ones of
    hosts that may not exist any more."""
    for path in above.glob(_prefix("*") + "*"):
        is_ours = path.name.startswith(_prefix(_host()))
        with suppress(OSError):
            if not is_ours and time.time() - path.stat().st_mtime < _OTHER_HOST_S:
                continue
        lock = _locked(path, surely=True)
        if lock is not None:
            TemporaryFolder(path, [lock]).delete()


def _host() -> str:
    return os.uname().nodename.replace("/", "_")
