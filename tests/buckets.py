"""A bucket in memory that fails on demand, and a real server of S3 on loopback.

    bucket = ModelBucket()
    store = ObjectStore(bucket.client(fail), threads=1)

`fail(verb, key, when)` is called before and after the effect of each request, and may raise: an
`UnansweredError` for a request that the store did not answer, a `LateError` for a put that the
store receives later, a `Dead` for a process that was killed there.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from holdfast.errors import NotFoundError
from holdfast.storage.bucket import Listing, StoredObject, TakenError, UnansweredError, Version
from holdfast.storage.store import Buffer

Fail = Callable[[str, str, str], None]
"""`fail(verb, key, when)`: `when` is `before` or `after` the effect of the request."""

CHANGES = ("put_new", "put_over", "put", "copy", "upload", "part", "complete", "delete")
"""Verbs of the requests that change a bucket. A large object takes an `upload`, a `part` for each
of its parts and a `complete`; the deletion of several objects takes a `delete` for each."""


class LateError(UnansweredError):
    """The client gives a request up, and the store receives it later: see `ModelBucket.arrive`."""


class Dead(BaseException):
    """The process was killed. Not an Exception: nothing may handle it."""


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    modified: datetime

    def described(self, key: str) -> StoredObject:
        # A hash of the bytes, as in S3: equal bytes are an equal version.
        version = {"e_tag": f'"{hashlib.md5(self.data).hexdigest()}"'}
        return StoredObject(key, len(self.data), version, self.modified)


class ModelBucket:
    """Content of a bucket, with a clock that tests set forward."""

    def __init__(self, objects: Mapping[str, bytes] | None = None, *, lag: int = 0) -> None:
        """`lag`: listings do not show the last `lag` changes."""
        self.mutex = threading.RLock()
        self.lag = lag
        self.ahead = timedelta()
        """Time by which the clock of the store is ahead."""

        self.late: list[Callable[[], object]] = []
        """Requests on their way, whose clients have given them up."""

        self.objects: dict[str, _Object] = {}
        for key, data in (objects or {}).items():
            self.put(key, data)
        self._seen = [self.objects]

    def client(self, fail: Fail = lambda *_: None) -> ModelClient:
        """Return a client, whose requests may fail."""
        return ModelClient(self, fail)

    def arrive(self) -> None:
        """Execute the requests that are on their way, if their conditions hold."""
        for request in self.late:
            with suppress(TakenError, NotFoundError):
                request()
        self.late = []

    def contents(self) -> dict[str, bytes]:
        """The bytes of every object."""
        return {key: found.data for key, found in self.objects.items()}

    def listed(self) -> dict[str, _Object]:
        """Objects that a listing shows."""
        return self._seen[max(0, len(self._seen) - 1 - self.lag)]

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def put(self, key: str, data: bytes) -> Version:
        self._set({**self.objects, key: _Object(data, self.now())})
        return self.objects[key].described(key).version

    def delete(self, key: str) -> None:
        self._set({name: found for name, found in self.objects.items() if name != key})

    def _set(self, objects: dict[str, _Object]) -> None:
        self.objects = objects
        if hasattr(self, "_seen"):
            self._seen = [*self._seen[-self.lag - 1 :], objects]


class ModelClient:
    """A `Bucket`: the view of one process on a `ModelBucket`."""

    def __init__(self, bucket: ModelBucket, fail: Fail) -> None:
        self._bucket, self._fail = bucket, fail

    @property
    def url(self) -> str:
        return "model://bucket"

    def head(self, key: str) -> StoredObject:
        return self._get("head", key).described(key)

    def get(self, key: str, nbytes_max: int) -> tuple[bytes, StoredObject]:
        found = self._get("get", key)
        return found.data[:nbytes_max], found.described(key)

    def get_range(self, key: str, start: int, stop: int) -> Buffer:
        return self._get("get_range", key).data[start:stop]

    def get_into(self, key: str, start: int, target: memoryview) -> int:
        data = self._get("get_range", key).data[start : start + len(target)]
        target[: len(data)] = data
        return len(data)

    def _get(self, verb: str, key: str) -> _Object:
        self._fail(verb, key, "before")
        with self._bucket.mutex:
            found = self._bucket.objects.get(key)
        self._fail(verb, key, "after")
        if found is None:
            raise NotFoundError(f"nothing at `{self.url}/{key}`")
        return found

    def put_new(self, key: str, data: bytes) -> Version:
        def put() -> Version:
            with self._bucket.mutex:
                if key in self._bucket.objects:
                    raise TakenError(key)
                return self._bucket.put(key, data)

        return self._send("put_new", key, put)

    def put_over(self, key: str, data: bytes, version: Version) -> Version:
        def put() -> Version:
            with self._bucket.mutex:
                found = self._bucket.objects.get(key)
                if found is None or found.described(key).version != version:
                    raise TakenError(key)
                return self._bucket.put(key, data)

        return self._send("put_over", key, put)

    def put(self, key: str, data: bytes) -> None:
        def put() -> Version:
            with self._bucket.mutex:
                return self._bucket.put(key, data)

        self._send("put", key, put)

    def _send(self, verb: str, key: str, put: Callable[[], Version]) -> Version:
        try:
            self._fail(verb, key, "before")
        except LateError:
            self._bucket.late.append(put)
            raise
        version = put()
        self._fail(verb, key, "after")
        return version

    def put_stream(self, key: str, parts: Iterator[Buffer]) -> None:
        self._fail("upload", key, "before")
        self._fail("upload", key, "after")
        data = []
        for part in parts:
            self._fail("part", key, "before")
            data.append(bytes(part))
            self._fail("part", key, "after")
        self._fail("complete", key, "before")
        with self._bucket.mutex:
            self._bucket.put(key, b"".join(data))
        self._fail("complete", key, "after")

    def copy(self, source: str, target: str) -> None:
        def put() -> Version:
            with self._bucket.mutex:
                found = self._bucket.objects.get(source)
                if found is None:
                    raise NotFoundError(f"nothing at `{self.url}/{source}`")
                return self._bucket.put(target, found.data)

        self._send("copy", target, put)

    def list(self, prefix: str) -> Listing:
        start = f"{prefix}/" if prefix else ""
        self._fail("list", prefix, "before")
        with self._bucket.mutex:
            listed = self._bucket.listed()
        self._fail("list", prefix, "after")
        below = {key: found for key, found in listed.items() if key.startswith(start)}
        names = {key: key[len(start) :].partition("/") for key in below}
        objects = [found.described(key) for key, found in below.items() if not names[key][1]]
        prefixes = sorted({name for name, slash, _ in names.values() if slash})
        return Listing(objects, prefixes)

    def list_all(self, prefix: str) -> Iterator[StoredObject]:
        self._fail("list", prefix, "before")
        with self._bucket.mutex:
            listed = self._bucket.listed()
        self._fail("list", prefix, "after")
        start = f"{prefix}/" if prefix else ""
        yield from (found.described(key) for key, found in listed.items() if key.startswith(start))

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._fail("delete", key, "before")
            with self._bucket.mutex:
                self._bucket.delete(key)
            self._fail("delete", key, "after")
