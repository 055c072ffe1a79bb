"""From the path that a person gives to a place in a store."""

from __future__ import annotations

import os

from holdfast.catalog.catalog import Catalog
from holdfast.errors import UsageError
from holdfast.storage.local import LocalStore


def open_root(path: str | os.PathLike[str]) -> tuple[Catalog, str]:
    """The catalog that the checkpoint at `path` lies in, and its name there."""
    folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 - links stay links
    if not name:
        raise UsageError(f"`{os.fspath(path)}` is no place for a checkpoint: it has no name")
    return Catalog(LocalStore(folder)), name
