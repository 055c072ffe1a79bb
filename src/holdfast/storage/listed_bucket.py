"""A view of a bucket that needs few requests, for readers that check a bucket again and again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice

from holdfast.errors import NotFoundError, StorageError
from holdfast.storage.bucket import Bucket, Listing, StoredObject, Version
from holdfast.storage.store import Buffer

OBJECTS_MAX = 100_000
"""Maximum number of objects to list below one prefix, which takes a hundred requests."""

LISTINGS_MAX = 2000
"""Maximum number of prefixes to list one by one between two calls of `refresh`."""

SMALL_BYTES = 4096
"""Maximum size of objects whose content is remembered: pointers, marks and the records of runs."""


class TooManyError(StorageError):
    """A bucket has more objects or prefixes than a `ListedBucket` lists."""


class ListedBucket:
    """A `Bucket` that finds out from its listings what exists, and remembers small objects.

    Its answers are as old as the last `refresh`, so check the bucket itself before you report that
    something is missing. Writes go to the bucket, and reads show them after the next `refresh`.
    """

    def __init__(self, bucket: Bucket, below: str | None = None) -> None:
        """`below`: prefix below which `refresh` lists everything at once, with one request per
        thousand objects. None: each prefix is listed when it is first needed."""
        self._bucket, self._below = bucket, below
        self._listings: dict[str, Listing] = {}
        self._objects: dict[str, StoredObject] = {}
        self._small: dict[str, tuple[StoredObject, bytes]] = {}

    @property
    def url(self) -> str:
        return self._bucket.url

    def refresh(self) -> None:
        """Forget all listings, and list everything below the prefix again.

        Raises:
            TooManyError: there are more than `OBJECTS_MAX` objects.
        """
        if self._below is None:
            self._listings, self._objects = {}, {}
            return
        found = [*islice(self._bucket.list_all(self._below), OBJECTS_MAX + 1)]
        if len(found) > OBJECTS_MAX:
            raise TooManyError(f"`{self.url}/{self._below}` has more than {OBJECTS_MAX:,} objects")
        self._listings = _listings(found, self._below)
        known = self._objects = {one.key: one for one in found}
        self._small = {k: kept for k, kept in self._small.items() if known.get(k) == kept[0]}

    def list(self, prefix: str) -> Listing:
        if prefix not in self._listings:
            if self._is_listed(f"{prefix}/"):
                return Listing([], [])
            if len(self._listings) >= LISTINGS_MAX:
                raise TooManyError(f"`{self.url}` has more than {LISTINGS_MAX:,} prefixes")
            self._listings[prefix] = listing = self._bucket.list(prefix)
            self._objects |= {one.key: one for one in listing.objects}
        return self._listings[prefix]

    def list_all(self, prefix: str) -> Iterator[StoredObject]:
        return self._bucket.list_all(prefix)

    def head(self, key: str) -> StoredObject:
        if self._below is None:
            self.list(key.rpartition("/")[0])
        elif not self._is_listed(key):
            return self._bucket.head(key)
        if key not in self._objects:
            raise NotFoundError(f"nothing at `{self.url}/{key}`")
        return self._objects[key]

    def get(self, key: str, nbytes_max: int) -> tuple[bytes, StoredObject]:
        found = self.head(key)
        if found.nbytes > SMALL_BYTES:
            return self._bucket.get(key, nbytes_max)
        return self._content(found)[:nbytes_max], found

    def get_range(self, key: str, start: int, stop: int) -> Buffer:
        found = self.head(key)
        if found.nbytes > SMALL_BYTES:
            return self._bucket.get_range(key, start, stop)
        return self._content(found)[start:stop]

    def get_into(self, key: str, start: int, target: memoryview) -> int:
        found = self.head(key)
        if found.nbytes > SMALL_BYTES:
            return self._bucket.get_into(key, start, target)
        data = self._content(found)[start : start + len(target)]
        target[: len(data)] = data
        return len(data)

    def _is_listed(self, key: str) -> bool:
        """Return whether `key` is below the prefix that `refresh` lists."""
        return self._below is not None and key.startswith(f"{self._below}/")

    def _content(self, found: StoredObject) -> bytes:
        known = self._small.get(found.key)
        if known is None or known[0] != found:
            data = (
                bytes(self._bucket.get_range(found.key, 0, found.nbytes)) if found.nbytes else b""
            )
            known = self._small[found.key] = found, data
        return known[1]

    # ------------------------------------------------------------------------------------ writing

    def put_new(self, key: str, data: bytes) -> Version:
        return self._bucket.put_new(key, data)

    def put_over(self, key: str, data: bytes, version: Version) -> Version:
        return self._bucket.put_over(key, data, version)

    def put(self, key: str, data: bytes) -> None:
        self._bucket.put(key, data)

    def put_stream(self, key: str, parts: Iterator[Buffer]) -> None:
        self._bucket.put_stream(key, parts)

    def copy(self, source: str, target: str) -> None:
        self._bucket.copy(source, target)

    def delete(self, keys: Sequence[str]) -> None:
        self._bucket.delete(keys)


def _listings(found: Sequence[StoredObject], below: str) -> dict[str, Listing]:
    """Return a listing of `below`, and of each prefix below it. `found`: all objects there."""
    objects: defaultdict[str, list[StoredObject]] = defaultdict(list)
    prefixes: defaultdict[str, set[str]] = defaultdict(set)
    for one in found:
        objects[one.key.rpartition("/")[0]].append(one)
    for folder in [*objects]:
        while folder != below:
            folder, _, name = folder.rpartition("/")
            prefixes[folder].add(name)
    return {
        folder: Listing(objects[folder], sorted(prefixes[folder]))
        for folder in {*objects, *prefixes}
    }
