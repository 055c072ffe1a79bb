"""Reading a checkpoint that another process may replace meanwhile: look again before calling it
damaged."""

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
"""Times that a checkpoint is read at most while others replace it."""

UNREADABLE = (DamagedError, FormatError, NotFoundError, StorageError)
"""Errors in which reading a checkpoint ends that is damaged, or that has been replaced."""

_TAIL_BYTES = 32
"""A manifest ends in a checksum of all of it."""


def fingerprint(store: ReadStore, name: str) -> object:
    """A value that stays equal for as long as the checkpoint `name` is not replaced. Cheap: reads
    the end of its index, or sizes where it has no manifest."""
    try:
        above, _, last = name.rpartition("/")
        if last in store.list(above):
            return store.size(name)
        files = store.list(name)
        if MANIFEST in files:
            nbytes = store.size(f"{name}/{MANIFEST}")
            return nbytes, store.read(f"{name}/{MANIFEST}", nbytes - _TAIL_BYTES, nbytes)
        return [(file, store.size(f"{name}/{file}")) for file in files if not file.endswith("/")]
    except HoldfastError as error:
        return type(error)


def is_deleted(store: ReadStore, name: str) -> bool:
    """Whether nothing has the name of checkpoint `name` any longer, as after retention."""
    above, _, last = name.rpartition("/")
    try:
        return not {last, f"{last}/"} & {*store.list(above)}
    except HoldfastError:
        return False


def read_steadily(store: ReadStore, name: str, read: Callable[[], T]) -> T:
    """What `read` makes of the checkpoint `name`. Called again where it fails on a checkpoint that
    was replaced in the meantime."""
    for _ in range(LOOKS_MAX - 1):
        before = fingerprint(store, name)
        try:
            return read()
        except UNREADABLE:
            if fingerprint(store, name) == before:
                raise
    return read()
