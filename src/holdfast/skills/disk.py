"""Disk operations of the sync, one method each, so that tests can simulate power cuts between them.

Only changes that the docstring of a method calls durable are certain to survive a power cut.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Constants of Linux' `fcntl.h` and `linux/fs.h`."""

_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems without `RENAME_EXCHANGE`, such as NFS."""


class Disk:
    """The file system of this machine. Methods raise OSError."""

    def make_folder(self, path: Path) -> None:
        """Make a new folder."""
        path.mkdir()

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file. Its content is durable at once, its name only after `sync_folder`."""
        self._write(path, data, 0o666)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file with its mode, or a link. A copied file is as durable as after `write`."""
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            self._write(target, source.read_bytes(), source.stat().st_mode & 0o777)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder atomically. A file replaces the file at `target`."""
        source.rename(target)

    def exchange(self, a: Path, b: Path) -> bool:
        """Exchange the names of two folders atomically; False if the system cannot do that."""
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:
            return False
        if not renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
            return True
        code = ctypes.get_errno()
        if code in _NO_EXCHANGE:
            return False
        raise OSError(code, os.strerror(code), str(b))

    def remove(self, path: Path) -> None:
        """Delete a folder and everything in it."""
        shutil.rmtree(path)

    def _write(self, path: Path, data: bytes, mode: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file)
