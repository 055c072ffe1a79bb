"""Folders of this machine for the files of a checkpoint that is in an object store.

Another program writes the files there before they are put into the store, or reads them there after
they were fetched. A process locks its folders, and deletes those that no process has locked, which
killed processes have left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from holdfast.errors import StorageError

_TRIES = 100
"""Most folders that are made for one caller, if other processes delete one after the other."""


@dataclass(frozen=True, slots=True)
class Staging:
    """A folder that this process has locked."""

    path: Path
    lock: int
    """Open descriptor of the folder, which holds the lock."""

    @classmethod
    def make(cls, above: Path | None = None) -> Self:
        """Make an empty folder, and delete the folders beside it that killed processes have left.

        `above`: folder to make it in; by default the folder for temporary files, which the
        environment variable TMPDIR names.

        Raises:
            StorageError: no folder can be made there.
        """
        above = Path(tempfile.gettempdir()) if above is None else above
        with _storage_errors(above):
            above.mkdir(parents=True, exist_ok=True)
            _clean_up(above)
            for _ in range(_TRIES):
                path = Path(tempfile.mkdtemp(prefix=_prefix(), dir=above))
                lock = _locked(path)
                if lock is not None:
                    return cls(path, lock)
        raise StorageError(f"every folder that was made in `{above}` was deleted at once")

    def delete(self) -> None:
        """Delete the folder and the files in it. May be called twice."""
        # Lost files are no harm: they are in the store, or the checkpoint is given up.
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self.lock)


@contextmanager
def _storage_errors(above: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot make a folder in `{above}`: {error.strerror or error}",
            hint="let the environment variable TMPDIR name a folder with room for a checkpoint",
        ) from error


def _prefix() -> str:
    return f".holdfast-{os.getuid()}-"


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
    """Delete the folders of killed processes of this user."""
    for path in above.glob(f"{_prefix()}*"):
        lock = _locked(path, surely=True)
        if lock is not None:
            Staging(path, lock).delete()
