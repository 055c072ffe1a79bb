"""Opening files that a stranger may have put there: plain files only, and without waiting."""

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
    """What a file of this mode is, for people."""
    return _KINDS.get(stat.S_IFMT(mode), "a plain file")


def check_plain(path: str, mode: int) -> None:
    """Make sure that what lies at `path` and has this mode is a plain file.

    Raises:
        NotFoundError: it is a folder.
        FormatError: it is a pipe, a socket or a device.
    """
    if stat.S_ISDIR(mode):
        raise NotFoundError(f"`{path}` is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise FormatError(
            f"`{path}` is {kind_of(mode)}, not a plain file",
            hint="only plain files are read; remove it if it does not belong there",
        )


def open_plain(path: str, flags: int) -> int:
    """Open a plain file and return its descriptor. Never waits for the other end of a pipe.

    Raises:
        NotFoundError: it is a folder.
        FormatError: it is a pipe, a socket or a device.
    """
    try:
        file = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        # Sockets, and pipes that nobody reads, cannot be opened at all.
        if error.errno == errno.ENXIO:
            check_plain(path, os.stat(path).st_mode)
        raise
    try:
        check_plain(path, os.fstat(file).st_mode)
    except BaseException:
        os.close(file)
        raise
    return file
