"""The Trainer's checkpoints in a folder or at a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from holdfast.catalog.newest import why_not_good
from holdfast.catalog.seal import has_seal
from holdfast.errors import HoldfastError, NotFoundError
from holdfast.format.names import number_of
from holdfast.hosts.choosing import check_sealed
from holdfast.storage.opening import is_url, open_store
from holdfast.storage.store import ReadStore

CHECKPOINT = re.compile(r"checkpoint-[0-9]+")

STATE = "trainer_state.json"

SENTINEL = "checkpoint-is-incomplete.txt"
"""File that the Trainer writes into the folder before it saves on SIGTERM."""


def named(step: int) -> str:
    return f"checkpoint-{step}"


def check_path(path: Path) -> None:
    """Raise a DamagedError if the checkpoint is damaged. Warn if it has no seal to check."""
    if not path.is_dir():
        return  # The Trainer's own error says more.
    check_sealed(path, hint="`resume_from_checkpoint=True` takes the newest good one")


def checkpoints(root: str) -> list[str]:
    """Return the names of the Trainer's checkpoints in a folder or at a URL, the newest first."""
    try:
        return checkpoints_in(open_store(root))
    except NotFoundError:
        return []


def first_that_exists(paths: Sequence[str]) -> str | None:
    """Return the first of these paths and URLs at which there is a checkpoint."""
    return next((path for path in paths if exists(path)), None)


def exists(path: str) -> bool:
    """Return whether there is a folder at a path or URL. False if nobody can tell."""
    if not is_url(path):
        return os.path.isdir(path)  # noqa: PTH112 - text, as the Trainer keeps it
    try:
        return PurePath(path).name in checkpoints(above(path))
    except HoldfastError:
        return False


def above(path: str) -> str:
    return os.path.dirname(path) or "."  # noqa: PTH120 - text, which may be a URL


def checkpoints_in(store: ReadStore) -> list[str]:
    """Return the names of the Trainer's checkpoints at the root of a store, the newest first."""
    names = [entry.rstrip("/") for entry in store.list() if entry.endswith("/")]
    names = [name for name in names if CHECKPOINT.fullmatch(name)]
    return sorted(names, key=lambda name: number_of(name) or 0, reverse=True)


def is_whole(store: ReadStore, name: str) -> bool:
    """Return whether a checkpoint has a seal, and all files that the seal lists, in these sizes."""
    return has_seal(store, name) and why_not_good(store, name, quick=True) is None


def remove_sentinel(path: Path) -> None:
    """Delete the file that the Trainer writes into a folder before it saves there on SIGTERM.

    If the folder is empty then, delete the folder.
    """
    (path / SENTINEL).unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
