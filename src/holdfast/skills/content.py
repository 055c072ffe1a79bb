"""Digests of the files in a folder, by which two folders are compared."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from holdfast.errors import StorageError

RECEIPT = ".holdfast-skill.json"
"""File in each installed copy that records what was installed."""

_IGNORED = {"__pycache__", ".DS_Store", "Thumbs.db", "desktop.ini", RECEIPT}
"""Files that programs create by themselves, so they are no changes by the user."""

Digests = Mapping[str, str]
"""Path below the folder, with `/` -> SHA-256 of the file, or target of the link."""


def digest(data: bytes) -> str:
    """Returns the SHA-256 of a file. CRLF in text counts as LF, so checkouts on Windows match."""
    if b"\0" not in data:
        data = data.replace(b"\r\n", b"\n")
    return hashlib.sha256(data).hexdigest()


def digests_in(folder: Path) -> Digests:
    """Returns the digests of all files below a folder. Links are not followed.

    Raises:
        StorageError: a file that cannot be read, or a pipe, socket or device.
    """
    digests: dict[str, str] = {}
    waiting = [folder]
    try:
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if entry.name in _IGNORED or entry.name.endswith(".pyc"):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                        continue
                    digests[path.relative_to(folder).as_posix()] = _digest_of(path)
    except OSError as error:
        raise StorageError(f"cannot read `{folder}`: {error.strerror or error}") from error
    return digests


def _digest_of(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"link to {path.readlink()}"
    if not stat.S_ISREG(mode):
        # Reading a pipe could wait forever.
        raise StorageError(f"`{path}` is no plain file", hint="move it out of the skill's folder")
    return digest(path.read_bytes())
