"""From the path that a person gives to a place in a store."""

from __future__ import annotations

import os

from holdfast.arguments import checked_path
from holdfast.catalog.catalog import Catalog, standing
from holdfast.errors import UsageError
from holdfast.format.names import check_name
from holdfast.storage.opening import folder_store, is_url, local_path, open_store, without_scheme
from holdfast.storage.store import ReadStore


def open_root(path: str | os.PathLike[str]) -> tuple[Catalog, str]:
    """The catalog that a checkpoint is to be saved in, and its name there.

    Raises:
        UsageError: a URL, a path without a name, or a name that no checkpoint may have.
    """
    full = local_path(checked_path(path, "path"))
    folder, name = _split(full)
    check_name(name, full)
    return Catalog(folder_store(folder)), name


def open_for_reading(path: str | os.PathLike[str]) -> tuple[ReadStore, str]:
    """The store that the checkpoint at `path`, a folder or a URL, lies in, and its name there, or
    that of the folder that stands for it (`standing`).

    Raises:
        UsageError: no path.
    """
    store, name = place_of(path)
    return store, standing(store, name)


def place_of(path: str | os.PathLike[str]) -> tuple[ReadStore, str]:
    """The store that `path`, a folder or a URL, lies in, and its name there."""
    text = without_scheme(checked_path(path, "path"))
    folder, name = _split(text.rstrip("/") if is_url(text) else local_path(text))
    return open_store(folder), name


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    if not name:
        raise UsageError(f"`{path}` is no place for a checkpoint: it has no name")
    return folder or "/", name
