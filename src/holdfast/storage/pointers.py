"""The pointers of a bucket: which attempt is the checkpoint of that name."""

from __future__ import annotations

from contextlib import suppress
from threading import Lock
from typing import NamedTuple

from holdfast.errors import NotFoundError
from holdfast.format.dcp import in_subfolder, leads_to_subfolder
from holdfast.format.names import MANIFEST, METADATA
from holdfast.format.pointer import POINTER_BYTES_MAX, id_in
from holdfast.storage.bucket import Bucket, Version

_TRIES = 5
"""Most times that the index of stock DCP is written while other processes publish."""

_START_BYTES = 300
"""Bytes of an index of stock DCP that hold its first file name."""


class Pointer(NamedTuple):
    """One state of a pointer."""

    id: str
    version: Version


class Pointers:
    """Reads pointers, and remembers them for reads that may be late."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._known: dict[str, Pointer | None] = {}
        self._mutex = Lock()

    def of(
        self, folder: str, *, fresh: bool = False, version: Version | None = None
    ) -> Pointer | None:
        """Return the pointer of a folder; None if it has none. `fresh`: read it again. `version`:
        read it again unless it is this one."""
        with self._mutex:
            known, is_known = self._known.get(folder), folder in self._known
        stale = version is not None and (known is None or known.version != version)
        return known if is_known and not fresh and not stale else self.read(folder)

    def read(self, folder: str) -> Pointer | None:
        """Read the pointer of a folder; None if it has none."""
        pointer = None
        with suppress(NotFoundError):
            key = f"{folder}/{MANIFEST}".lstrip("/")
            data, found = self._bucket.get(key, POINTER_BYTES_MAX + 1)
            attempt_id = id_in(data)
            pointer = None if attempt_id is None else Pointer(attempt_id, found.version)
        with self._mutex:
            self._known[folder] = pointer
        return pointer

    def forget(self, folder: str) -> None:
        """Read the pointer of this folder when it is needed next."""
        with self._mutex:
            self._known.pop(folder, None)

    def write_stock_index(self, name: str) -> None:
        """Make `NAME/.metadata` lead stock readers to the attempt that the pointer names; delete it
        if there is no pointer, or if that attempt has no index of stock DCP."""
        pointer = self.read(name)
        for _ in range(_TRIES):
            data = None
            if pointer is not None:
                inner = f"{name}/{pointer.id}/{METADATA}"
                with suppress(NotFoundError):
                    nbytes = self._bucket.head(inner).nbytes
                    data = in_subfolder(bytes(self._bucket.get_range(inner, 0, nbytes)), pointer.id)
            if data is not None:
                self._bucket.put(f"{name}/{METADATA}", data)
            elif self.is_left_over(name):
                self._bucket.delete([f"{name}/{METADATA}"])
            # Another process may have published or deleted the checkpoint meanwhile.
            before, pointer = pointer, self.read(name)
            if pointer == before:
                return

    def is_left_over(self, name: str) -> bool:
        """Whether `NAME/.metadata` leads into an attempt, and so is no file of a user."""
        with suppress(NotFoundError):
            return leads_to_subfolder(self._bucket.get(f"{name}/{METADATA}", _START_BYTES)[0])
        return False
