"""A file that this process holds open, and that no forked child keeps."""

from __future__ import annotations

import os

from holdfast.storage.forks import leave_in_children


class HeldFile:
    """File or folder that this process keeps open until `give_up`. Forked children close their
    copies at once."""

    def __init__(self, descriptor: int) -> None:
        """Hold the open file with this descriptor. Call this in the block of `no_fork_between` that
        opens the file, so that no fork happens before the file is registered."""
        self.descriptor: int = descriptor
        """Descriptor of the open file; -1 once the file is given up."""

        self._pid = os.getpid()
        status = os.fstat(descriptor)
        self.file: tuple[int, int] = (status.st_dev, status.st_ino)
        """Device and inode of the file."""

        leave_in_children(self)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the file. False after `give_up`, and in a forked child."""
        return self.descriptor >= 0 and self._pid == os.getpid()

    def is_at(self, path: str) -> bool:
        """Return whether the file still has this path."""
        return self.file == file_at(path)

    def give_up(self) -> int:
        """Stop holding the file. Returns its descriptor, which the caller closes."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def leave(self) -> None:
        """Close this process's copy of the file. Called in a forked child, while the parent still
        holds the file (see `forks`)."""
        descriptor = self.give_up()
        if descriptor >= 0:
            os.close(descriptor)


def file_at(path: str) -> tuple[int, int] | None:
    """Return device and inode of the file or folder at this path; None if there is nothing."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
