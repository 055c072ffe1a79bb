"""What a folder holds, as a value that can be compared: a digest of each of its files."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from holdfast.errors import StorageError

RECEIPT = ".holdfast-skill.json"
"""Beside the files of an installed skill; not one of them."""

_JUNK = {"__pycache__", ".DS_Store", "Thumbs.db", "desktop.ini", RECEIPT}
"""What editors, interpreters and file browsers leave behind: nobody's change."""

Digests = Mapping[str, str]
"""Path below the folder, with `/`, to what is known of the file there."""


def digest(data: bytes) -> str:
    """SHA-256 of a file. Text counts with LF ends of lines: a checkout with CRLF is no change."""
    if b"\0" not in data:
        data = data.replace(b"\r\n", b"\n")
    return hashlib.sha256(data).hexdigest()


def digests_in(folder: Path) -> Digests:
    """Of every file below a folder. A link is known by where it leads, and never followed.

    Raises:
        StorageError: a file that cannot be read, or is something else than a file.
    """
    found: dict[str, str] = {}
    waiting = [folder]
    try:
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if entry.name in _JUNK or entry.name.endswith(".pyc"):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                        continue
                    found[path.relative_to(folder).as_posix()] = _known_by(path)
    except OSError as error:
        raise StorageError(f"cannot read `{folder}`: {error.strerror or error}") from error
    return found


def _known_by(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"link to {path.readlink()}"
    if not stat.S_ISREG(mode):
        # A pipe would be waited for without end.
        raise StorageError(f"`{path}` is no file", hint="move it out of the skill's folder")
    return digest(path.read_bytes())
