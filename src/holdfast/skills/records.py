"""Data that the sync compares and stores: hashes of files, receipts of copies, and a ledger."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import FormatError, StorageError

RECEIPT = ".holdfast-skill.json"
"""Name of the receipt: a file in each installed copy, which lists the installed files."""

_IGNORED = {"__pycache__", ".DS_Store", "Thumbs.db", "desktop.ini", RECEIPT}
"""Names of files and folders that programs create, so they do not count as the user's."""

Digests = Mapping[str, str]
"""SHA-256 of each file in a folder, or target of each link, by path with `/`."""


def digest(data: bytes) -> str:
    """Return the SHA-256 of a file. Hash CRLF in text as LF, so that checkouts on Windows match."""
    if b"\0" not in data:
        data = data.replace(b"\r\n", b"\n")
    return hashlib.sha256(data).hexdigest()


def digests_in(folder: Path) -> Digests:
    """Return the SHA-256 of all files below a folder. Links are not followed.

    Raises:
        StorageError: a file cannot be read, or is a pipe, socket or device.
    """
    try:
        return {path.relative_to(folder).as_posix(): _digest_of(path) for path in _files_in(folder)}
    except OSError as error:
        raise StorageError(f"cannot read `{folder}`: {error.strerror or error}") from error


def _files_in(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in _IGNORED or path.suffix == ".pyc":
            continue
        if not path.is_symlink() and path.is_dir():
            yield from _files_in(path)
        else:
            yield path


def _digest_of(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if not path.is_file():
        # Reading a pipe could wait forever.
        raise StorageError(f"`{path}` is no plain file", hint="move it out of the skill's folder")
    return digest(path.read_bytes())


@dataclass(frozen=True, slots=True)
class SyncRecord:
    """Receipt of one installed skill: its files, and the version of Holdfast that installed it.

    The receipt is a file in the user's copy of the skill, so that both move together.
    """

    version: str
    """Version of Holdfast that installed the copy."""

    files: Digests
    """SHA-256 of every installed file, by path."""

    def encode(self) -> bytes:
        return _encode({"holdfast": self.version, "files": dict(sorted(self.files.items()))})


def decode_receipt(data: bytes) -> SyncRecord | None:
    """Decode the receipt of a copy. Return None if it is damaged: the copy then counts as the
    user's own."""
    try:
        body: Any = json.loads(data)
        version, files = body["holdfast"], dict(body["files"].items())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if {*map(type, (version, *files.values()))} != {str}:
        return None
    return SyncRecord(version, files)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Record of the skills that were installed or removed.

    By it, a sync knows whether a missing copy was deleted by the user, or never installed.
    """

    offered: frozenset[str] = frozenset()
    """Skills that have been installed, and that were still shipped at the last sync."""

    removed: frozenset[str] = frozenset()
    """Skills that the user removed, and installed skills that are no longer shipped. A sync never
    installs a missing copy of them."""

    def encode(self) -> bytes:
        return _encode({"offered": sorted(self.offered), "removed": sorted(self.removed)})


def decode_ledger(data: bytes, *, where: str) -> Ledger:
    """Decode a ledger: the record of installed and removed skills.

    Raises:
        FormatError: the ledger is damaged. Treating it as empty would bring back deleted skills.
    """
    try:
        body: Any = json.loads(data)
        offered, removed = body["offered"], body["removed"]
        if any(type(name) is not str for name in (*offered, *removed)):
            raise ValueError("a name that is no text")
        return Ledger(offered=frozenset(offered), removed=frozenset(removed))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FormatError(
            f"`{where}` is no record of skills: {error}",
            hint="move it away to start afresh; skills that you deleted then come back",
        ) from error


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1).encode() + b"\n"


def order_of(version: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version, to compare versions.

    >>> order_of("0.10.1.dev3") > order_of("0.9")
    True
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
