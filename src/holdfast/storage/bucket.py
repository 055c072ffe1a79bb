"""The requests that a bucket answers. `storage/objects.py` builds a store from them.

Each request takes effect as a whole or not at all. `get`, `head` and `put` see every earlier
change. `list` may miss recent changes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from holdfast.errors import StorageError
from holdfast.storage.store import Buffer

T = TypeVar("T")

PAUSE_S = 0.5
"""Longest pause, in seconds, before a request is sent again."""

Version = Mapping[str, str]
"""Identifies one version of an object, for `put_over`: by an ETag, a generation, or both."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Description of one object in a bucket."""

    key: str
    nbytes: int
    version: Version
    modified: datetime
    """Time of the object's last change, by the clock of the store."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Objects and prefixes directly below a prefix."""

    objects: Sequence[StoredObject]
    prefixes: Sequence[str]
    """Names below which there are more objects, without a slash at the end."""


class TakenError(Exception):
    """A conditional put was refused: the object exists, or is not the expected version."""


class UnansweredError(StorageError):
    """The store failed, or its answer was lost: the request may have taken effect, or not."""


def until_answered(
    request: Callable[[], T], tries: int, *, may_repeat: Callable[[], bool] = lambda: True
) -> T:
    """Send a request until the store answers, up to `tries` times. Sending it twice must be safe
    while `may_repeat()` is true.

    Raises:
        UnansweredError: the store did not answer any try.
    """
    for _ in range(tries - 1):
        try:
            return request()
        except UnansweredError:
            if not may_repeat():
                raise
        pause()
    return request()


def pause() -> None:
    """Wait before a request is sent again. The time is random, so that clients do not all send at
    the same moment."""
    time.sleep(random.uniform(0, PAUSE_S))


class Bucket(Protocol):
    """Objects below one prefix of a bucket. Keys are relative to the prefix.

    Every method may raise `StorageError`. Methods that read may also raise `NotFoundError`.
    """

    @property
    def url(self) -> str:
        """URL of the prefix, for messages."""
        ...

    def head(self, key: str) -> StoredObject:
        """Return the description of an object, without its content."""
        ...

    def get(self, key: str, nbytes_max: int) -> tuple[bytes, StoredObject]:
        """Return the first bytes of an object, at most `nbytes_max`, and its description."""
        ...

    def get_range(self, key: str, start: int, stop: int) -> Buffer:
        """Return bytes `start` to `stop` of an object, or fewer if the object ends earlier."""
        ...

    def get_into(self, key: str, start: int, target: memoryview) -> int:
        """Fill `target` with bytes of an object from `start` on. Returns the number of bytes read,
        which is smaller than `target` only if the object ends first."""
        ...

    def put_new(self, key: str, data: bytes) -> Version:
        """Put an object that does not exist yet, and return its version. Sends one request;
        retrying is up to the caller.

        Raises:
            TakenError: the object exists.
            UnansweredError: the object may exist now.
        """
        ...

    def put_over(self, key: str, data: bytes, version: Version) -> Version:
        """Replace an object that has this version, and return the new version. Sends one request;
        retrying is up to the caller.

        Raises:
            TakenError: the object has another version, or does not exist.
            UnansweredError: the object may have been replaced.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Put an object, whether it exists or not."""
        ...

    def put_stream(self, key: str, parts: Iterator[Buffer]) -> None:
        """Put a large object by several requests that are sent at the same time.

        If iterating over `parts` raises an error, this raises the same error, and the object does
        not exist. Parts of it are left in the store only if the process dies.
        """
        ...

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the bucket, without sending its bytes. An object at `target` is
        replaced."""
        ...

    def list(self, prefix: str) -> Listing:
        """List the objects and prefixes directly below a prefix. The listing is empty if there are
        none."""
        ...

    def list_all(self, prefix: str) -> Iterator[StoredObject]:
        """List all objects below a prefix, at any depth, with one request per thousand objects."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, in any order. Objects that do not exist are ignored. After this returns
        or raises an error, no request that it sent takes effect any more."""
        ...
