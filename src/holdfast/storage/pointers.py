"""The pointers of a bucket: which attempt is the checkpoint of that name."""

from __future__ import annotations

from contextlib import suppress
from threading import Lock
from typing import NamedTuple

from holdfast.errors import NotFoundError
from holdfast.format.dcp import in_subfolder, leads_to_subfolder
from holdfast.format.names import MANIFEST, METADATA
from holdfast.format.pointer import POINTER_BYTES_MAX, id_in, reserved_in
from holdfast.storage.bucket import Bucket, TakenError, UnansweredError, Version

_TRIES = 5
"""Most times that the index of stock DCP is written while other processes publish."""

_START_BYTES = 300
"""Bytes of an index of stock DCP that hold its first file name."""


class Pointer(NamedTuple):
    """One state of a pointer."""

    id: str
    """ID of the checkpoint, or of the attempt that has reserved the name."""

    version: Version
    is_published: bool
    """Whether it is a checkpoint. Readers find nothing under a name that is only reserved."""


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
            if (published := id_in(data)) is not None:
                pointer = Pointer(published, found.version, is_published=True)
            elif (reserved := reserved_in(data)) is not None:
                pointer = Pointer(reserved, found.version, is_published=False)
        with self._mutex:
            self._known[folder] = pointer
        return pointer

    def forget(self, folder: str) -> None:
        """Read the pointer of this folder when it is needed next."""
        with self._mutex:
            self._known.pop(folder, None)

    def write_stock_index(self, name: str) -> None:
        """Make `NAME/.metadata` lead stock readers to the attempt that is published; delete it if
        none is, or if that attempt has no index of stock DCP."""
        failed: UnansweredError | None = None
        for _ in range(_TRIES):
            pointer = self.read(name)
            try:
                self._write_stock_index_of(name, pointer)
            except TakenError:
                continue
            except UnansweredError as error:
                failed = error
                continue
            # Another process may have published or deleted the checkpoint meanwhile.
            if self.read(name) == pointer:
                return
        if failed is not None:
            raise failed

    def _write_stock_index_of(self, name: str, pointer: Pointer | None) -> None:
        key, data = f"{name}/{METADATA}", None
        if pointer is not None and pointer.is_published:
            inner = f"{name}/{pointer.id}/{METADATA}"
            with suppress(NotFoundError):
                nbytes = self._bucket.head(inner).nbytes
                data = in_subfolder(bytes(self._bucket.get_range(inner, 0, nbytes)), pointer.id)
        if data is None:
            if self.is_left_over(name):
                self._bucket.delete([key])
            return
        # With a condition: a request that arrives late must not replace the index of a later save.
        try:
            found = self._bucket.head(key)
        except NotFoundError:
            self._bucket.put_new(key, data)
        else:
            self._bucket.put_over(key, data, found.version)

    def is_left_over(self, name: str) -> bool:
        """Whether `NAME/.metadata` leads into an attempt, and so is no file of a user."""
        with suppress(NotFoundError):
            return leads_to_subfolder(self._bucket.get(f"{name}/{METADATA}", _START_BYTES)[0])
        return False
