"""Read object stores and other URLs: `s3://`, `gs://`, `hf://`, `https://`.

fsspec finds the client for the scheme of a URL. No other module uses fsspec.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from holdfast.errors import NotFoundError, StorageError, UsageError
from holdfast.storage import links
from holdfast.storage.store import PlainReader

try:
    import fsspec
except ImportError:
    fsspec = None


class RemoteStore:
    """A tree of files at a URL, read through fsspec."""

    def __init__(self, url: str) -> None:
        if fsspec is None:
            raise UsageError(
                f"`{url}` is a URL, and fsspec is not installed",
                hint="pip install 'holdfast[remote]'",
            )
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"`{url}` cannot be opened: {error}") from error
        self._url = url

    @property
    def url(self) -> str:
        return self._url

    def list(self, folder: str = "") -> Sequence[str]:
        with self._errors_of(folder):
            entries = self._files.ls(self._path(folder), detail=True)
            names = [
                (entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory")
                for entry in entries
            ]
            return sorted(name + "/" * is_folder for name, is_folder in names)

    def size(self, key: str) -> int:
        with self._errors_of(key):
            return int(self._files.size(self._path(key)))

    def read(self, key: str, start: int, stop: int) -> bytes:
        with self._errors_of(key):
            data: bytes = self._files.cat_file(self._path(key), start=start, end=stop)
            return data

    def open(self, key: str) -> PlainReader:
        return PlainReader(self, key)

    def leads_out(self, folder: str, file: str) -> bool:
        if not getattr(self._files, "local_file", False):
            return False
        # `file://` is a local folder, which may have links.
        return links.leads_out(self._path(folder), file)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    @contextmanager
    def _errors_of(self, key: str) -> Iterator[None]:
        """Convert errors of the client to errors of Holdfast."""
        where = f"{self._url}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(f"nothing at `{where}`", file=where) from error
        except Exception as error:
            raise StorageError(
                f"cannot read `{where}`: {type(error).__name__} {error}",
                hint="check the network, the address and the credentials",
                file=where,
            ) from error
