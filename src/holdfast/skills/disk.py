"""What the sync does to a disk, one operation each, so that tests can cut the power between them.

Nothing is durable before it says so: a crash may lose anything else, keep it, or keep it in part.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.errors import StorageError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""From Linux' `fcntl.h` and `linux/fs.h`."""

_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


class Disk:
    """The file system of this machine. Methods raise OSError."""

    def make_folder(self, path: Path) -> None:
        """A new, empty folder."""
        path.mkdir()

    def write(self, path: Path, data: bytes) -> None:
        """A new file, its content durable; its name is once its folder is synced."""
        self._fill(path, data, 0o666)

    def copy(self, source: Path, target: Path) -> None:
        """A file or link of the user's under a new name, as `write`."""
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            self._fill(target, source.read_bytes(), source.stat().st_mode & 0o777)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file or folder, at one instant. A file takes the place of a file."""
        source.rename(target)

    def exchange(self, one: Path, other: Path) -> bool:
        """Two folders trade their names, at one instant; false where the system cannot do that."""
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:
            return False
        paths = os.fsencode(one), os.fsencode(other)
        if not renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
            return True
        code = ctypes.get_errno()
        if code in _NO_EXCHANGE:
            return False
        raise OSError(code, os.strerror(code), str(other))

    def remove(self, path: Path) -> None:
        """Delete a folder with all that is in it."""
        shutil.rmtree(path)

    @contextmanager
    def lock(self, path: Path) -> Iterator[bool]:
        """Whether this process may write until the context ends. Never waits: whoever holds the
        lock is at the same work.

        Raises:
            StorageError: the file system knows no locks.
        """
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise StorageError(
                    f"the file system of `{path.parent}` has no file locks",
                    hint="choose a folder on another one: holdfast skills sync --to FOLDER",
                ) from error
            yield True
        finally:
            os.close(file)

    def _fill(self, path: Path, data: bytes, mode: int) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(file, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(file)
