"""Find the right that this user lacks to a file or folder, and the command that grants it."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

_MASKS = {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}


@dataclass(frozen=True, slots=True)
class MissingRight:
    """A right that this user lacks, or a file system that allows no change."""

    what: str
    mend: str | None
    """Command that grants the right; None if neither the owner nor the mode explains the lack."""


def missing_right(path: Path, *, writes: bool = False) -> MissingRight | None:
    """Return the right that this user lacks to read a file or folder; None if none is missing.

    `writes`: whether to write into the folder `path` too.
    """
    for above in reversed(path.parents):
        if not os.access(above, os.X_OK):
            found = _missing(above, "x")
            # Do not print a command that changes the owner of a whole tree.
            is_own = above.stat().st_uid == os.geteuid()
            return found if is_own else MissingRight(found.what, None)
    try:
        is_folder = path.is_dir()
    except OSError:
        return None  # The disk or the mount fails.
    needed = ("rx" if is_folder else "r") + "w" * writes
    lacking = "".join(right for right in needed if not os.access(path, _MASKS[right]))
    return _missing(path, lacking) if lacking and path.exists() else None


def _missing(path: Path, rights: str) -> MissingRight:
    if "w" in rights and os.statvfs(path).f_flag & os.ST_RDONLY:
        mount = path.resolve()
        while not mount.is_mount():
            mount = mount.parent
        what = f"the file system at `{mount}` is mounted read-only"
        return MissingRight(what, f"sudo mount -o remount,rw {shlex.quote(str(mount))}")
    status, quoted = path.stat(), shlex.quote(str(path))
    if status.st_uid != os.geteuid():
        mend = f"sudo chown -R {os.geteuid()} {quoted}"
        return MissingRight(f"`{path}` is owned by user {status.st_uid}", mend)
    owned = {"r": 0o400, "w": 0o200, "x": 0o100}
    if all(status.st_mode & owned[right] for right in rights):
        return MissingRight(f"an ACL or an attribute of `{path}` refuses the access", None)
    what = f"`{path}` is yours, but its mode {status.st_mode & 0o777:03o} lacks the right {rights}"
    return MissingRight(what, f"chmod u+{rights} {quoted}")
