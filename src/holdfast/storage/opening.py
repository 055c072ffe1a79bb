"""Open the store for a path or URL.

Other modules must not make a `LocalStore` themselves. Given a URL, a `LocalStore` saves to a local
folder called `s3:`.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import entry_points

from holdfast.errors import UsageError
from holdfast.storage.local import LocalStore
from holdfast.storage.store import ReadStore, Store

_LOCAL = "file:///"

_SHORTENED = re.compile(r"(?:^|/)[A-Za-z][A-Za-z0-9+.-]+:(?=/)")
"""Start of a URL that went through `pathlib`, which turns `s3://` into `s3:/`."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a URL rather than a local path."""
    return "://" in os.fsdecode(path)


def check_not_shortened(path: str | os.PathLike[str]) -> None:
    """Raise a UsageError if `path` is a URL that went through `pathlib`, and no local path."""
    text = os.fsdecode(path)
    shortened = _SHORTENED.search(text)
    if shortened and not is_url(text) and not os.path.isdir(text[: shortened.end()]):  # noqa: PTH112
        raise UsageError(
            f"`{text}` is a URL that has lost a slash",
            hint="pass the URL as text: `pathlib` turns `s3://` into `s3:/`",
        )


def local_path(path: str | os.PathLike[str]) -> str:
    """Return the absolute form of a local path, without resolving links.

    Raises:
        UsageError: `path` is a URL, is not a valid path, or is relative to a deleted folder.
    """
    text = os.fsdecode(path)
    if is_url(text):
        raise UsageError(
            f"`{text}` is a URL, where only a local folder works",
            hint="pass the path of a folder of this machine",
        )
    check_not_shortened(text)
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is not the path of a folder", hint="`.` is the current folder")
    if text.startswith("~"):
        raise UsageError(
            f"`{text}` starts with `~`, which the shell replaces, and Holdfast does not",
            hint="leave `~` out of quotes, or call `os.path.expanduser`; `./~` is a folder of that "
            "name",
        )
    try:
        return os.path.abspath(text)  # noqa: PTH100 - links stay links
    except FileNotFoundError as error:
        raise UsageError(
            f"`{text}` is relative to the current folder, which has been deleted",
            hint="change to another folder (cd), or pass an absolute path",
        ) from error


def folder_store(path: str | os.PathLike[str]) -> LocalStore:
    """Return the store of a local folder.

    Raises:
        UsageError: `path` is a URL, or is not a valid path.
    """
    return LocalStore(local_path(path))


def without_scheme(url: str | os.PathLike[str]) -> str:
    """Return the path of a `file://` URL; return other paths and URLs unchanged.

    >>> without_scheme("file:///data/run"), without_scheme("s3://bucket/run")
    ('/data/run', 's3://bucket/run')
    """
    text = os.fsdecode(url)
    return text.removeprefix("file://") if text.startswith(_LOCAL) else text


BUCKETS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
"""URL schemes of the object stores to which Holdfast can save."""

GROUP = "holdfast.stores"
"""Group of entry points by which other packages provide stores. The name of an entry point is the
scheme of a URL, such as `minio`. It refers to a function that takes the URL and returns a
`Store`."""


def third_party_store(url: str) -> Store | None:
    """Return the store that another package provides for the scheme of this URL; None if no
    package does."""
    for entry_point in entry_points(group=GROUP, name=url.partition("://")[0]):
        store: Store = entry_point.load()(url)
        return store
    return None


def store_to_save(path: str | os.PathLike[str]) -> Store:
    """Return the store of a local folder, or of a URL that Holdfast can write to.

    Raises:
        UsageError: `path` is not a valid path, or is a URL to which Holdfast cannot write.
    """
    text = without_scheme(path)
    if not is_url(text):
        return folder_store(text)
    store = written_store(text)
    if store is None:
        raise UsageError(
            f"`{text}` is a URL to which Holdfast cannot write",
            hint="save to a folder, or to a bucket: s3://, gs:// or az://",
        )
    return store


def written_store(url: str) -> Store | None:
    """Return a store that can write to this URL; None if Holdfast has none for it."""
    if (store := third_party_store(url)) is not None:
        return store
    if url.partition("://")[0] not in BUCKETS:
        return None
    # Imported here, since local folders do not need obstore.
    from holdfast.storage.cloud import CloudBucket
    from holdfast.storage.objects import ObjectStore

    return ObjectStore(CloudBucket(url))


def open_store(url: str | os.PathLike[str]) -> ReadStore:
    """Return the store of a folder or a URL, for reading.

    Raises:
        UsageError: `url` is not a valid path, or is a URL that no installed client opens.
    """
    text = without_scheme(url)
    if is_url(text):
        if (store := written_store(text)) is not None:
            return store
        from holdfast.storage.remote import RemoteStore  # Local folders do not need it.

        return RemoteStore(text)
    return folder_store(text)
