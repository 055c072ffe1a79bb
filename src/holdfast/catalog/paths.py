"""Splits the path of a checkpoint into a store, or a catalog, and a name in it."""

from __future__ import annotations

import os

from holdfast.arguments import checked_path
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.steady import folder_of
from holdfast.errors import UsageError
from holdfast.format.names import check_name
from holdfast.storage.opening import is_url, local_path, open_store, store_to_save, without_scheme
from holdfast.storage.store import ReadStore


def open_for_saving(path: str | os.PathLike[str]) -> tuple[Catalog, str]:
    """Return the catalog of the folder above `path`, to save a checkpoint in, and the last part of
    `path`, which is the name of the checkpoint.

    Raises:
        UsageError: `path` is a URL that Holdfast cannot write to, has no name, has a name that no
            checkpoint may have, or is a folder that cannot be replaced.
    """
    full = full_path(path)
    folder, name = split_path(full)
    check_name(name, full)
    if not is_url(full):
        _check_replaceable(full)
    return Catalog(store_to_save(folder)), name


def open_for_reading(path: str | os.PathLike[str]) -> tuple[ReadStore, str]:
    """Return the store that holds the checkpoint at `path`, and the name of the checkpoint's folder
    in it. This is the last part of `path`, or a `.replaced` folder if a save was killed while it
    replaced the checkpoint. `path` is a folder, a file or a URL."""
    store, name = open_parent(path)
    return store, folder_of(store, name)


def open_parent(path: str | os.PathLike[str]) -> tuple[ReadStore, str]:
    """Return the store of the folder or URL above `path`, and the last part of `path`."""
    folder, name = split_path(full_path(path))
    return open_store(folder), name


def full_path(path: str | os.PathLike[str]) -> str:
    """Return the absolute path, or the URL without a slash at its end.

    Raises:
        UsageError: `path` is not a path.
    """
    text = without_scheme(checked_path(path, "path"))
    return text.rstrip("/") if is_url(text) else local_path(text)


def _check_replaceable(path: str) -> None:
    """Raise a UsageError if `path` is a mount point, which no rename can replace, or the current
    folder of this process."""
    if not os.path.isdir(path):  # noqa: PTH112 - text, as all paths here
        return
    if os.path.ismount(path):
        raise UsageError(
            f"`{path}` is a mount point, and a checkpoint takes its place by a rename",
            hint=f"save to a folder in it, such as {path}/checkpoint",
        )
    if os.path.samefile(path, os.curdir):  # noqa: PTH121
        raise UsageError(
            f"`{path}` is the current folder of this process, and a checkpoint would replace it",
            hint="save to a folder in it",
        )


def split_path(path: str) -> tuple[str, str]:
    """Split an absolute path, or a URL, into the folder above it and its last part.

    Raises:
        UsageError: the path ends in a slash, or is a whole bucket.
    """
    folder, _, name = path.rpartition("/")
    if not name:
        raise UsageError(f"`{path}` has no name after its last slash, so it names no checkpoint")
    if folder.endswith(":/"):
        raise UsageError(
            f"`{path}` is a whole bucket", hint=f"name a folder in it, such as {path}/run"
        )
    return folder or "/", name
