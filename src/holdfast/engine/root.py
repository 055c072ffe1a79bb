"""From the path that a person gives to a place in a store."""

from __future__ import annotations

import os

from holdfast.arguments import checked_path
from holdfast.catalog.catalog import Catalog, standing
from holdfast.errors import UsageError
from holdfast.storage.local import LocalStore
from holdfast.storage.store import ReadStore


def open_root(path: str | os.PathLike[str]) -> tuple[Catalog, str]:
    """The catalog that a checkpoint is to be saved in, and its name there.

    Raises:
        UsageError: a URL, or a path without a name.
    """
    path = checked_path(path, "path")
    if _is_url(path):
        raise UsageError(
            f"`{path}` is a URL: checkpoints are loaded from there, but saved to folders",
            hint="save to a folder, then copy it with the tool of that store",
        )
    folder, name = _split(path)
    return Catalog(LocalStore(folder)), name


def open_for_reading(path: str | os.PathLike[str]) -> tuple[ReadStore, str]:
    """The store that the checkpoint at `path`, a folder or a URL, lies in, and its name there, or
    that of the folder that stands for it (`standing`).

    Raises:
        UsageError: no path.
    """
    path = checked_path(path, "path")
    if _is_url(path):
        from holdfast.storage.remote import RemoteStore

        folder, _, name = str(path).rstrip("/").rpartition("/")
        return RemoteStore(folder), name
    folder, name = _split(path)
    store = LocalStore(folder)
    return store, standing(store, name)


def _split(path: str | os.PathLike[str]) -> tuple[str, str]:
    folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 - links stay links
    if not name:
        raise UsageError(f"`{os.fspath(path)}` is no place for a checkpoint: it has no name")
    return folder, name


def _is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)
