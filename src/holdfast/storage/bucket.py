"""The requests that a bucket answers. `storage/objects.py` builds a store from them.

Each request takes effect as a whole or not at all. `get`, `head` and `put` see every earlier
change; `list` may lag behind.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from holdfast.errors import StorageError
from holdfast.storage.store import Buffer

T = TypeVar("T")

PAUSE_S = 0.5
"""Longest pause before a request is sent again."""

Version = Mapping[str, str]
"""Identifies one content of an object, for `put_over`: an ETag, a generation, or both."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Description of one object."""

    key: str
    nbytes: int
    version: Version
    modified: datetime
    """Time of its last change, by the clock of the store."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Objects and prefixes directly below a prefix."""

    objects: Sequence[StoredObject]
    prefixes: Sequence[str]
    """Names that more objects are below, without a slash at the end."""


class TakenError(Exception):
    """A conditional put was refused: the object exists, or is not the expected version."""


class UnansweredError(StorageError):
    """The store failed, or its answer was lost: the request may have taken effect, or not."""


def until_answered(request: Callable[[], T], tries: int) -> T:
    """Send a request up to `tries` times, until it is answered. It must have the same effect again.

    Raises:
        UnansweredError: it was never answered.
    """
    for _ in range(tries - 1):
        with suppress(UnansweredError):
            return request()
        pause()
    return request()


def pause() -> None:
    """Wait before a request is sent again: for a random time, so that clients do not send theirs
    together."""
    time.sleep(random.uniform(0, PAUSE_S))


class Bucket(Protocol):
    """Objects below one prefix of a bucket. Keys are relative to it.

    Every method may raise `StorageError`; those that read, `NotFoundError`.
    """

    @property
    def url(self) -> str:
        """URL of the prefix, for messages."""
        ...

    def head(self, key: str) -> StoredObject:
        """Describe an object."""
        ...

    def get(self, key: str, nbytes_max: int) -> tuple[bytes, StoredObject]:
        """Return the first bytes of an object, at most `nbytes_max`, and its description."""
        ...

    def get_range(self, key: str, start: int, stop: int) -> Buffer:
        """Return bytes `start` to `stop` of an object; fewer only if the object ends before."""
        ...

    def get_into(self, key: str, start: int, target: memoryview) -> int:
        """Fill `target` with bytes of an object from `start` on. Returns the bytes read; fewer only
        if the object ends before."""
        ...

    def put_new(self, key: str, data: bytes) -> Version:
        """Put an object that does not exist yet. Sent once: the caller tries again.

        Raises:
            TakenError: the object exists.
            UnansweredError: it may exist now.
        """
        ...

    def put_over(self, key: str, data: bytes, version: Version) -> Version:
        """Put an object in the place of this version of it. Sent once: the caller tries again.

        Raises:
            TakenError: the object has another version, or does not exist.
            UnansweredError: it may have been replaced.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Put an object, whether it exists or not."""
        ...

    def put_stream(self, key: str, parts: Iterator[Buffer]) -> None:
        """Put a large object, in several requests that overlap.

        An error of `parts` is raised, and no object is left; nor is a part of one, unless the
        process dies.
        """
        ...

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the bucket, without sending its bytes. An object at `target` is
        replaced."""
        ...

    def list(self, prefix: str) -> Listing:
        """List what is directly below a prefix; nothing if no object is."""
        ...

    def list_all(self, prefix: str) -> Iterator[StoredObject]:
        """List all objects below a prefix, at any depth, by a request per thousand."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, in any order. An object that does not exist is no error. No request takes
        effect after this has raised an error, or returned."""
        ...
