"""The pointers of a bucket. Each says which attempt is published under a name."""

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
"""Maximum number of times that the index of stock DCP is written while other processes publish."""

_START_BYTES = 300
"""Number of bytes from the start of an index of stock DCP that include its first file name."""


class Pointer(NamedTuple):
    """Content and version of a pointer, or of the reservation in its place."""

    id: str
    """ID of the attempt that is published, or that has reserved the name."""

    version: Version
    is_published: bool
    """Whether the attempt is published. If the name is only reserved, readers find nothing."""


class Pointers:
    """Reads pointers, and remembers them for reads that need not see the latest change."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._known: dict[str, Pointer | None] = {}
        self._mutex = Lock()

    def of(
        self, folder: str, *, fresh: bool = False, version: Version | None = None
    ) -> Pointer | None:
        """Return the pointer of a folder; None if the folder has no pointer.

        Reads the pointer if it is not remembered, if `fresh` is true, or if the remembered pointer
        does not have this `version`.
        """
        with self._mutex:
            known, is_known = self._known.get(folder), folder in self._known
        stale = version is not None and (known is None or known.version != version)
        return known if is_known and not fresh and not stale else self.read(folder)

    def read(self, folder: str) -> Pointer | None:
        """Read the pointer of a folder; None if the folder has no pointer."""
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
        """Forget the pointer of this folder, so that it is read again when it is next needed."""
        with self._mutex:
            self._known.pop(folder, None)

    def write_stock_index(self, name: str) -> None:
        """Write `NAME/.metadata`, which leads readers of stock DCP to the published attempt. Delete
        it if no attempt is published, or if the published one has no index of stock DCP."""
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
        # Put with a condition: a request that arrives late must not replace a later save's index.
        try:
            found = self._bucket.head(key)
        except NotFoundError:
            self._bucket.put_new(key, data)
        else:
            self._bucket.put_over(key, data, found.version)

    def is_left_over(self, name: str) -> bool:
        """Return whether Holdfast wrote `NAME/.metadata`, to lead readers of stock DCP to the files
        of an attempt. Otherwise it is a user's file, or there is none."""
        with suppress(NotFoundError):
            return leads_to_subfolder(self._bucket.get(f"{name}/{METADATA}", _START_BYTES)[0])
        return False
