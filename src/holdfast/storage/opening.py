"""From what a person calls a place, a folder or a URL, to a store: the only way to make either.

Whatever builds its own `LocalStore` would take a URL for the name of a folder here, and save a run
to a folder called `s3:`.
"""

from __future__ import annotations

import os
import re

from holdfast.errors import UsageError
from holdfast.storage.local import LocalStore
from holdfast.storage.store import ReadStore

_LOCAL = "file:///"

_SHORTENED = re.compile(r"(?:^|/)[A-Za-z][A-Za-z0-9+.-]+:(?=/)")
"""A URL that went through `pathlib`, which makes `s3:/` of `s3://`."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names a place behind a URL, and no folder or file of this machine."""
    return "://" in os.fsdecode(path)


def local_path(path: str | os.PathLike[str]) -> str:
    """The absolute path of a folder or file of this machine; links in it stay links.

    Raises:
        UsageError: it is a URL, no path at all, or relative to something that is not there.
    """
    text = os.fsdecode(path)
    shortened = _SHORTENED.search(text)
    if is_url(text) or (shortened and not os.path.isdir(text[: shortened.end()])):  # noqa: PTH112
        raise UsageError(
            f"`{text}` is a URL, and only folders of this machine can be written to",
            hint="save to a folder, then copy it with the tool of that store",
        )
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
    """The store of a folder of this machine.

    Raises:
        UsageError: `path` is a URL, or no path at all.
    """
    return LocalStore(local_path(path))


def without_scheme(url: str | os.PathLike[str]) -> str:
    """The path that a `file://` URL stands for; any other path or URL as it is.

    >>> without_scheme("file:///data/run"), without_scheme("s3://bucket/run")
    ('/data/run', 's3://bucket/run')
    """
    text = os.fsdecode(url)
    return text.removeprefix("file://") if text.startswith(_LOCAL) else text


def open_store(url: str | os.PathLike[str]) -> ReadStore:
    """The store of a folder or of a URL, for reading.

    Raises:
        UsageError: nothing that can be opened.
    """
    text = without_scheme(url)
    if is_url(text):
        from holdfast.storage.remote import RemoteStore  # Folders need no fsspec.

        return RemoteStore(text)
    return folder_store(text)
