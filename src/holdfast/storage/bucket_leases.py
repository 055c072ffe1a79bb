"""Leases: locks in a bucket, which lapse when their holder does not renew them any more.

A process takes a lease by putting an object that must not exist yet, and renews the lease by
replacing its own last version of the object. Another process may take a lease that was not renewed
for `LEASE_S`, by replacing the version that it found. If two processes try this at once, only one
succeeds. Only the clock of the store measures the age of a lease: a process puts another object
now, and compares the times of both objects.

A holder must not send a request that needs the lease after the lease has lapsed. So the holder
counts the lease as valid for half of `LEASE_S` after it sent the last renewal, by a monotonic
clock. A request that it sends in this time takes effect in the other half of `LEASE_S` or never:
the client gives up after `REQUEST_S`, and a store does not execute a request whose connection was
closed long ago.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial

from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError, UsageError
from holdfast.format.names import held_file
from holdfast.storage.bucket import (
    Bucket,
    StoredObject,
    TakenError,
    UnansweredError,
    Version,
    until_answered,
)
from holdfast.storage.processes import runs, this_process

LEASE_S = 60.0
"""Seconds from the last renewal of a lease until the lease lapses."""

REQUEST_S = 10.0
"""Time-out, in seconds, of one try of a request that a lease protects, and also of all tries
together. The sum of both time-outs is less than half of `LEASE_S`."""

NOTE_BYTES_MAX = 4096
"""Maximum number of bytes that are read of a lease's object."""

_RENEWALS = 6
"""Number of renewals per `LEASE_S`."""

_TRIES = 5
"""Maximum number of times that a process tries to put a lease."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Holder of a lease that this process could not take."""

    note: str
    version: Version
    """Version of the lease, which changes whenever the holder renews the lease."""

    is_alive: bool
    """Whether the holder is known to run, since it is a process of this machine."""


class BucketLease:
    """A lease of this process on an object, until `release` or until it lapses."""

    def __init__(self, bucket: Bucket, key: str, note: str) -> None:
        self._bucket, self._key, self._note = bucket, key, note
        self._token = secrets.token_hex(8)
        self._counter = 0
        self._version: Version | None = None
        """Version that this process has put; None while it does not hold the lease."""

        self._sent = self._trying = 0.0
        """Times at which this process sent the last renewal that took effect, and the last one that
        it tried."""

        self._pid = os.getpid()
        self._mutex = threading.RLock()

    @property
    def is_valid(self) -> bool:
        """Whether requests that need the lease may be sent now. False in a forked child."""
        fresh = time.monotonic() - self._sent < LEASE_S / 2
        return self._version is not None and fresh and self._pid == os.getpid()

    def take(self) -> Holder | None:
        """Take the lease and return None. If another process holds the lease, return the holder.

        Raises:
            StorageError: the store does not answer, or other processes take the lease again and
                again.
        """
        with self._mutex:
            version: Version | None = None
            for _ in range(_TRIES):
                try:
                    self._put(version)
                    return None
                except (TakenError, UnansweredError) as error:
                    failed = error
                found = self._look()
                if found is None:
                    version = None  # The holder has just released the lease, or our put got lost.
                    continue
                content, stored = found
                if content.token == self._token:
                    self._version, self._sent = stored.version, self._trying
                    return None
                is_running = runs(content.process)
                if is_running is not False and not self._has_lapsed(stored.modified):
                    return Holder(content.note, stored.version, is_alive=is_running is True)
                version = stored.version
            raise StorageError(f"cannot take the lease `{self._key}`: {failed}")

    def renew(self) -> None:
        """Extend the lease.

        Raises:
            ExistsError: this process does not hold the lease any more. If it has lapsed, the error
                names the new holder.
            StorageError: the store does not answer. The lease may still be valid.
        """
        with self._mutex:
            if self._version is None or self._pid != os.getpid():
                raise ExistsError(f"`{self._key}` is not held by this process")
            try:
                self._put(self._version)
                return
            except (TakenError, UnansweredError) as error:
                failed = error
            found = self._look()
            if found is not None and found[0].token == self._token:
                # Either the renewal took effect and only its answer was lost, or it did not take
                # effect and the next try may succeed.
                self._version = found[1].version
                if found[0].renewals != self._counter:
                    raise StorageError(f"cannot renew `{self._key}`: {failed}")
                self._sent = self._trying
                return
            self._version = None
            holder = "nobody: it was deleted" if found is None else found[0].note
            raise ExistsError(
                f"`{self._bucket.url}/{self._key}` was not renewed in time, and is held by another "
                f"process now: {holder}"
            )

    def _look(self) -> tuple[_Content, StoredObject] | None:
        """Return content and description of the lease's object; None if it does not exist."""
        try:
            data, found = self._bucket.get(self._key, NOTE_BYTES_MAX)
        except NotFoundError:
            return None
        return _decode(data), found

    def release(self) -> None:
        """Delete the lease's object if this process still holds the lease. Do nothing in a forked
        child."""
        with self._mutex:
            if not self.is_valid:
                # Another process may have taken the lease. Renew it first, so that only a lease of
                # this process is deleted.
                with contextlib.suppress(HoldfastError):
                    self.renew()
            if self.is_valid:
                self._version = None
                with contextlib.suppress(HoldfastError):
                    self._bucket.delete([self._key])

    def _put(self, version: Version | None) -> None:
        self._counter += 1
        # The counter makes the contents differ, since equal contents have the same ETag.
        content = _Content(self._note, self._token, this_process(), self._counter)
        data, sent = json.dumps(asdict(content)).encode(), time.monotonic()
        self._trying = sent
        if version is None:
            self._version = self._bucket.put_new(self._key, data)
        else:
            self._version = self._bucket.put_over(self._key, data, version)
        self._sent = sent

    def _has_lapsed(self, modified: datetime) -> bool:
        """Return whether a lease that was last changed at `modified` has lapsed, by the clock of
        the store."""
        folder = self._key.rpartition("/")[0]
        probe = f"{folder}/{held_file(f'now-{self._token}')}".lstrip("/")
        self._bucket.put(probe, b"")
        now = self._bucket.head(probe).modified
        self._bucket.delete([probe])
        return (now - modified).total_seconds() > LEASE_S


class BucketLeases:
    """All leases that one store holds. A thread renews them while there are any."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._held: dict[str, BucketLease] = {}
        self._is_checked = False
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        """Event that ends the renewing thread. Set while there is no such thread."""

        self._ended.set()
        self._pid = os.getpid()

    def check_conditions(self) -> None:
        """Check that the store obeys the conditions `If-None-Match` and `If-Match` of a put, which
        leases and pointers need. After the first success, calls do nothing.

        Raises:
            UsageError: the store puts an object although its condition does not hold.
        """
        if self._is_checked:
            return
        probe = held_file(f"now-{secrets.token_hex(8)}")
        try:
            self._bucket.put(probe, b"1")
            first = self._bucket.head(probe).version
            self._bucket.put(probe, b"2")
            conditions = {
                "If-None-Match": partial(self._bucket.put_new, probe, b"3"),
                "If-Match": partial(self._bucket.put_over, probe, b"3", first),
            }
            for condition, put in conditions.items():
                # The conditions of these puts are false, so a store that obeys them refuses each
                # put and changes nothing. Therefore it is safe to try again without an answer.
                if until_answered(partial(_takes, put), _TRIES):
                    raise UsageError(
                        f"`{self._bucket.url}`: this store ignores the condition `{condition}` of "
                        "a put, so two runs could not be kept apart",
                        hint="use a newer version of the store, or another one",
                    )
        finally:
            with contextlib.suppress(HoldfastError):
                self._bucket.delete([probe])
        self._is_checked = True

    def new(self, key: str, note: str) -> BucketLease:
        """Return a lease that is not taken yet."""
        return BucketLease(self._bucket, key, note)

    def keep(self, key: str, lease: BucketLease) -> None:
        """Keep renewing a lease that was taken, until `release`."""
        with self._mutex:
            self._held[key] = lease
            if self._ended.is_set() or self._pid != os.getpid():
                self._pid, self._ended = os.getpid(), threading.Event()
                renew = _renewing(weakref.ref(self), self._ended, LEASE_S / _RENEWALS)
                threading.Thread(target=renew, name="holdfast-lease", daemon=True).start()

    def held(self, key: str) -> BucketLease | None:
        """Return the lease that this store holds on `key`; None if it holds no such lease."""
        with self._mutex:
            return self._held.get(key)

    def release(self, key: str, lease: BucketLease) -> None:
        """Stop renewing a lease, and release it."""
        with self._mutex:
            if self._held.get(key) is lease:
                del self._held[key]
            if not self._held:
                self._ended.set()
        lease.release()

    def renew_all(self) -> None:
        """Renew all leases that this store holds. Ignore errors."""
        with self._mutex:
            leases = list(self._held.values())
        for lease in leases:
            # If a lease is lost, the next operation that needs it notices this and raises an error.
            with contextlib.suppress(HoldfastError):
                lease.renew()


def _takes(put: Callable[[], object]) -> bool:
    """Return whether the store executes a put whose condition does not hold."""
    try:
        put()
    except TakenError:
        return False
    return True


def _renewing(
    leases: weakref.ref[BucketLeases], ended: threading.Event, interval_s: float
) -> Callable[[], None]:
    """Return the function that the renewing thread runs. It ends when the last lease is released,
    or when the store is garbage-collected."""

    def run() -> None:
        while not ended.wait(interval_s):
            found = leases()
            if found is None:
                return
            found.renew_all()
            del found

    return run


def check(lease: BucketLease, hint: str) -> None:
    """Check that requests that need the lease may be sent now. Renew the lease if it is too old.

    Raises:
        ExistsError: another process has the lease.
        StorageError: the lease cannot be renewed in time.
    """
    if not lease.is_valid:
        lease.renew()
    if not lease.is_valid:
        raise StorageError("a lease could not be renewed in time: the store is slow", hint=hint)


def note_in(data: bytes) -> str:
    """Return the holder's note in the content of a lease."""
    return _decode(data).note


@dataclass(frozen=True, slots=True)
class _Content:
    """Content of a lease's object: its holder, and how often the lease was put."""

    note: str = "unknown"
    token: str = ""
    process: str = ""
    renewals: int = 0


def _decode(data: bytes) -> _Content:
    try:
        members = json.loads(data)
        note, token, process = (str(members[name]) for name in ("note", "token", "process"))
        return _Content(note, token, process, renewals=int(members["renewals"]))
    except (ValueError, LookupError, TypeError):
        return _Content()
