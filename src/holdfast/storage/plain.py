"""Open untrusted files safely: only plain files, and without waiting for a pipe."""

from __future__ import annotations

import errno
import os
import stat

from holdfast.errors import FormatError, NotFoundError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


def kind_of(mode: int) -> str:
    """Describe the kind of a file, given its mode."""
    return _KINDS.get(stat.S_IFMT(mode), "a plain file")


def check_plain(path: str, mode: int) -> None:
    """Check by its mode that `path` is a plain file.

    Raises:
        NotFoundError: `path` is a folder.
        FormatError: `path` is a pipe, a socket, a device or a link.
    """
    if stat.S_ISDIR(mode):
        raise NotFoundError(f"`{path}` is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise FormatError(
            f"`{path}` is {kind_of(mode)}, not a plain file",
            hint="Holdfast reads plain files only; remove it if it does not belong there",
        )


def open_plain(path: str, flags: int) -> int:
    """Open a plain file and return its descriptor. Does not wait for the other end of a pipe.

    Raises:
        NotFoundError: `path` is a folder.
        FormatError: `path` is a pipe, a socket or a device.
    """
    try:
        file = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        # ENXIO comes from a socket, or from a pipe without a reader: raise a clearer error.
        if error.errno == errno.ENXIO:
            check_plain(path, os.stat(path).st_mode)
        raise
    try:
        check_plain(path, os.fstat(file).st_mode)
    except BaseException:
        os.close(file)
        raise
    return file
