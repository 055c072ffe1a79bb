"""Atomic renames that never replace a file, or a folder with files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import cache
from typing import Any

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without `RENAME_NOREPLACE`, such as NFS."""

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems without hard links."""


def rename_exclusive(source: str, target: str) -> None:
    """Rename a file or folder to a free name.

    Raises:
        FileExistsError: the name is taken, even if another process took it just now.
    """
    renameat2 = _renameat2()
    if renameat2 is not None:
        number = renameat2(os.fsencode(source), os.fsencode(target))
        if not number:
            return
        if number not in _UNSUPPORTED:
            raise OSError(number, os.strerror(number), source, None, target)
    rename_without_flag(source, target)


def rename_without_flag(source: str, target: str) -> None:
    """Like `rename_exclusive`, for file systems that do not support renameat2 with the flag
    `RENAME_NOREPLACE`."""
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    if not stat.S_ISDIR(os.lstat(source).st_mode):
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            os.unlink(source)
            return
    try:
        # Renaming a folder can replace only an empty folder, so no file is lost.
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
        raise


@cache
def _renameat2() -> Callable[[bytes, bytes], int] | None:
    """Return a function that renames its first path to its second one, and returns 0 or an errno.
    Return None if the C library does not have renameat2."""
    import ctypes  # Readers do not need this import.

    libc: Any = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "renameat2", None)
    if call is None:
        return None

    def rename(source: bytes, target: bytes) -> int:
        failed = call(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE)
        return ctypes.get_errno() if failed else 0

    return rename
