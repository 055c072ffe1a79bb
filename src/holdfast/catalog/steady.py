"""Reads checkpoints that another process may replace meanwhile. A read that fails is repeated, up
to a limit, if the checkpoint has been replaced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from holdfast.errors import (
    DamagedError,
    FormatError,
    HoldfastError,
    NotFoundError,
    StorageError,
)
from holdfast.format.names import MANIFEST, folder_among
from holdfast.storage.opening import is_url
from holdfast.storage.store import ReadStore

T = TypeVar("T")
U = TypeVar("U")

LOOKS_MAX = 5
"""Most times that a checkpoint is read while other processes replace it."""

UNREADABLE = (DamagedError, FormatError, NotFoundError, StorageError)
"""Errors that reading a damaged or replaced checkpoint may raise."""

_TAIL_BYTES = 32
"""Bytes at the end of a manifest that include its checksum."""


def retry_if_replaced(
    find: Callable[[], T],
    read: Callable[[T], U],
    was_replaced: Callable[[T], bool],
    is_good: Callable[[U], bool] = lambda _: True,
) -> U:
    """Return `read(find())`. Call both again if `read` fails, or `is_good` rejects its result, and
    `was_replaced` says that another process has replaced the checkpoint that `find` found."""
    for _ in range(LOOKS_MAX - 1):
        found = find()
        try:
            result = read(found)
        except UNREADABLE:
            if not was_replaced(found):
                raise
        else:
            if is_good(result) or not was_replaced(found):
                return result
    return read(find())


def read_steadily(
    store: ReadStore,
    name: str,
    read: Callable[[str, object], T],
    is_good: Callable[[T], bool] = lambda _: True,
) -> T:
    """Return `read(folder, fingerprint)` for the folder that has checkpoint `name` now. Call it
    again if it fails, or `is_good` rejects its result, because another process has replaced the
    checkpoint."""

    def find() -> tuple[str, object]:
        folder = folder_of(store, name)
        return folder, fingerprint(store, folder)

    return retry_if_replaced(
        find, lambda found: read(found[0], found[1]), lambda found: find() != found, is_good
    )


def fingerprint(store: ReadStore, name: str) -> object:
    """Return a value that stays equal until the checkpoint `name` is replaced.

    This is cheap: it reads the end of the manifest, or the file sizes if there is no manifest.
    """
    try:
        with suppress(HoldfastError):
            nbytes = store.size(f"{name}/{MANIFEST}")
            return nbytes, store.read(f"{name}/{MANIFEST}", nbytes - _TAIL_BYTES, nbytes)
        parent, _, last = name.rpartition("/")
        if last in store.list(parent):
            return store.size(name)
        files = store.list(name)
        return [(file, store.size(f"{name}/{file}")) for file in files if not file.endswith("/")]
    except HoldfastError as error:
        return type(error)


def folder_of(store: ReadStore, name: str) -> str:
    """Return the folder that has the files of checkpoint `name`: `name`, or a `.replaced` folder if
    a save was killed while it replaced the checkpoint.

    For a URL, the folder is `name`: object stores have no `.replaced` folders, and listing may be
    slow or forbidden.
    """
    if is_url(store.url):
        return name
    parent, _, last = name.rpartition("/")
    try:
        folder = folder_among(store.list(parent), last)
    except HoldfastError:
        return name
    return name if folder is None or folder == last else f"{parent}/{folder}".lstrip("/")


def is_deleted(store: ReadStore, name: str) -> bool:
    """Return whether a checkpoint is gone: no file or folder is named `name`."""
    parent, _, last = name.rpartition("/")
    try:
        return not {last, f"{last}/"} & {*store.list(parent)}
    except HoldfastError:
        return False
