"""Reads checkpoints that another process may replace meanwhile: an error counts only if the
checkpoint has not changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from holdfast.errors import (
    DamagedError,
    FormatError,
    HoldfastError,
    NotFoundError,
    StorageError,
)
from holdfast.format.names import MANIFEST
from holdfast.storage.store import ReadStore

T = TypeVar("T")

LOOKS_MAX = 5
"""Most times that a checkpoint is read while other processes replace it."""

UNREADABLE = (DamagedError, FormatError, NotFoundError, StorageError)
"""Errors that reading a damaged or replaced checkpoint may raise."""

_TAIL_BYTES = 32
"""Bytes at the end of a manifest that include its checksum."""


def fingerprint(store: ReadStore, name: str) -> object:
    """A value that stays equal until the checkpoint `name` is replaced.

    Cheap: reads the end of the manifest, or file sizes if there is none.
    """
    try:
        parent, _, last = name.rpartition("/")
        if last in store.list(parent):
            return store.size(name)
        files = store.list(name)
        if MANIFEST in files:
            nbytes = store.size(f"{name}/{MANIFEST}")
            return nbytes, store.read(f"{name}/{MANIFEST}", nbytes - _TAIL_BYTES, nbytes)
        return [(file, store.size(f"{name}/{file}")) for file in files if not file.endswith("/")]
    except HoldfastError as error:
        return type(error)


def is_deleted(store: ReadStore, name: str) -> bool:
    """Whether neither a file nor a folder has the name of checkpoint `name`."""
    parent, _, last = name.rpartition("/")
    try:
        return not {last, f"{last}/"} & {*store.list(parent)}
    except HoldfastError:
        return False


def read_steadily(store: ReadStore, name: str, read: Callable[[], T]) -> T:
    """Call `read`, and call it again if it fails and the checkpoint `name` was replaced."""
    for _ in range(LOOKS_MAX - 1):
        before = fingerprint(store, name)
        try:
            return read()
        except UNREADABLE:
            if fingerprint(store, name) == before:
                raise
    return read()
