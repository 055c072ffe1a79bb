"""Publish checkpoints that are single files.

.part-NAME-1f2e3d4c   a file that is being written
.kept-NAME-1f2e3d4c   the earlier NAME, until the file that has replaced it is durable

A process that saves holds a lock on its hidden files. Those that are not locked are leftovers of
killed processes.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Self

from holdfast.catalog.findings import summary_of
from holdfast.catalog.newest import check
from holdfast.catalog.seal import sync_path
from holdfast.errors import HoldfastError, StorageError
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.sealing import delete

logger: logging.Logger = logging.getLogger("holdfast")

_HIDDEN = re.compile(r"\.(part|kept)-(.+)-[0-9a-f]{8}")


@contextmanager
def published(path: Path, background: BackgroundSync) -> Iterator[IO[bytes]]:
    """Context that yields a hidden file, open for writing. At the end, it is renamed to `path`.

    The file is durable then if its folder has no durable checkpoint yet, or if the file that it
    replaces cannot be kept. Otherwise `background` makes it durable, and until then the file that
    it replaces is kept.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    background.make_way(str(path))
    _clean_up(path.parent)
    # The hidden name is unique, since another process may be saving to this path too.
    part = _hidden("part", path)
    kept = None
    try:
        with part.open("xb") as file:
            _lock(file.fileno())
            yield file
            file.flush()
            may_follow = background.may_follow(str(path.parent))
            kept = _Kept.link(path) if may_follow else None
            is_durable = not may_follow or (kept is None and path.exists())
            if is_durable:
                os.fsync(file.fileno())
            part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if kept is not None:
            kept.delete()
        if (why := why_not_written(error)) is not None:
            raise StorageError(f"cannot save `{path}`: {why}") from error
        raise
    if is_durable:
        sync_path(path.parent)
        background.note_durable(str(path.parent))
    else:
        background.sync(str(path), partial(_replace_durably, path, kept))


def why_not_written(error: BaseException) -> str | None:
    """Return the reason if `error` says that a file could not be written, such as a full disk; None
    for any other error."""
    # If a write fails, `torch.save` raises a RuntimeError with the cause in `__context__`.
    cause = error.__context__ if isinstance(error, RuntimeError) else error
    if not isinstance(cause, OSError):
        return None
    return cause.strerror or str(cause)


@contextmanager
def file_moved_aside(path: Path) -> Iterator[None]:
    """Context in which a file at `path` has a hidden name, so that a folder may be named `path`. At
    the end the file is deleted, or renamed back after an error. Without such a file, nothing
    happens."""
    if not path.is_file():
        yield
        return
    kept = _Kept(_hidden("kept", path), _locked(path))
    path.rename(kept.path)
    try:
        yield
    except BaseException:
        kept.path.rename(path)
        os.close(kept.lock)
        raise
    kept.delete()


def kept_aside(folder: Path, name: str) -> list[Path]:
    """Return earlier versions of file `name` in a folder, which are kept under hidden names."""
    return [path for path, role, of in _all_hidden(folder) if (role, of) == ("kept", name)]


def why_not_good(path: Path) -> str | None:
    """Return why a checkpoint must not be loaded; None if it is good."""
    try:
        findings = check(path)
    except HoldfastError as error:
        return error.what
    return summary_of(findings) if findings else None


@dataclass(frozen=True, slots=True)
class _Kept:
    """File that a save has replaced or will replace, kept under a hidden name."""

    path: Path
    lock: int
    """Open descriptor that holds a lock on the file."""

    @classmethod
    def link(cls, path: Path) -> Self | None:
        """Give the file at `path` a second, hidden name. Return None if there is no file, or if it
        cannot be linked."""
        if not path.is_file() or path.is_symlink():
            return None
        kept = _hidden("kept", path)
        lock = _locked(path)
        try:
            kept.hardlink_to(path)
        except OSError:
            os.close(lock)
            return None
        return cls(kept, lock)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.lock)


def _replace_durably(path: Path, kept: _Kept | None) -> None:
    """Make the file at `path` durable, then delete the earlier file that it has replaced. If this
    fails, this process keeps the lock on the earlier file, so that no save deletes that file."""
    sync_path(path)
    sync_path(path.parent)
    if kept is not None:
        kept.delete()


def _hidden(role: str, path: Path) -> Path:
    return path.parent / f".{role}-{path.name}-{os.urandom(4).hex()}"


def _locked(path: Path) -> int:
    lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    _lock(lock)
    return lock


def _lock(opened: int) -> None:
    """Lock the file with descriptor `opened`, if its file system has locks.

    In a file system without locks, leftovers are never deleted.
    """
    with suppress(OSError):
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _all_hidden(folder: Path) -> list[tuple[Path, str, str]]:
    """Return each hidden file in a folder: its path, its role, and the name of a visible file.

    "part": it is to become that file. "kept": it is an earlier version of that file.
    """
    if not folder.is_dir():
        return []
    matches = ((path, _HIDDEN.fullmatch(path.name)) for path in sorted(folder.iterdir()))
    return [(path, match[1], match[2]) for path, match in matches if match is not None]


def _clean_up(folder: Path) -> None:
    """Delete the hidden files that killed saves have left, but not those that a process has locked.
    An earlier file gets its name back if the file that has replaced it is damaged or missing."""
    for path, role, name in _all_hidden(folder):
        with suppress(OSError):
            opened = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clean_up_file(path, role, folder / name)
            finally:
                os.close(opened)


def _clean_up_file(path: Path, role: str, later: Path) -> None:
    """Delete a hidden file.

    But if its role is "kept", and `later`, the file that has replaced it, is damaged or missing,
    rename the hidden file to `later`.
    """
    why = "it is missing"
    if role == "kept" and (not later.exists() or (why := why_not_good(later) or "")):
        logger.warning("`%s` gets its earlier file back: %s", later, why)
        if later.is_dir():
            delete(later)
        path.replace(later)
    elif role == "kept":
        sync_path(later)
        path.unlink()
    else:
        path.unlink()
