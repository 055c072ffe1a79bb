"""Publish attempts in a bucket, so that no request takes effect after its attempt is given up.

A store may execute a request after the client has given the request up, or after the process that
sent it has died. Such a late request must not publish an attempt whose files are deleted by then.
So every put of a pointer has a condition, and another process can make this condition fail:

* A save to a free name first reserves the name: it puts a reservation, which names the save's
  attempt, if there is no object yet. The pointer then replaces this version of the reservation.
* A save that replaces a checkpoint replaces the current version of the checkpoint's pointer.

Before a process deletes the files of an attempt, it ends the attempt's claim (`Claims.end`). It
deletes the attempt's reservation; or if the attempt was to replace a checkpoint, it puts the
pointer of that checkpoint once more, as a new version. No two versions are equal, so the condition
of a late request never holds again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError
from holdfast.format.names import MANIFEST
from holdfast.format.pointer import encode_pointer, encode_reservation
from holdfast.storage.bucket import Bucket, TakenError, UnansweredError, pause
from holdfast.storage.pointers import Pointer, Pointers
from holdfast.storage.store import Check

_TRIES = 5
"""Maximum number of times that a conditional request is sent."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The claim of one attempt to be published under a name."""

    name: str
    """Name of the checkpoint, with the folders above it."""

    attempt_id: str

    replaced: Pointer | None
    """Pointer of the checkpoint to replace; None if the name must be free. The caller holds this
    checkpoint."""


class Claims:
    """Publishes attempts in a bucket, or ends their claims."""

    def __init__(self, bucket: Bucket, pointers: Pointers) -> None:
        self._bucket, self._pointers = bucket, pointers

    def publish(self, claim: Claim, check: Check, end_other: Callable[[str], bool]) -> None:
        """Publish an attempt.

        `check` raises an error if this process does not hold the attempt any more. `end_other`
        takes the ID of another attempt, ends that attempt's claim if no process holds the attempt,
        and returns whether it has ended the claim.

        Raises:
            ExistsError: the name is taken, or is reserved by a save that is still running.
        """
        expected = claim.replaced
        for _ in range(_TRIES):
            try:
                if expected is None:
                    check()
                    data = encode_reservation(claim.attempt_id)
                    version = self._bucket.put_new(_marker(claim.name), data)
                    expected = Pointer(claim.attempt_id, version, is_published=False)
                check()
                data = encode_pointer(claim.attempt_id)
                self._bucket.put_over(_marker(claim.name), data, expected.version)
                return
            except (TakenError, UnansweredError) as error:
                # Either another attempt is in the way, or our request or its answer was lost.
                found = self._found_after(claim.name, error)
                if found is not None and found.is_published and found.id == claim.attempt_id:
                    return
                if not self._is_open(claim, found, error, end_other):
                    raise ExistsError(f"`{self._where(claim.name)}` exists already") from error
                is_ours = claim.replaced or (found is not None and found.id == claim.attempt_id)
                expected = found if is_ours else None
                pause()
        raise StorageError(f"`{self._where(claim.name)}` could not be published: the store is busy")

    def _is_open(
        self,
        claim: Claim,
        found: Pointer | None,
        error: Exception,
        end_other: Callable[[str], bool],
    ) -> bool:
        """Return whether the attempt of a claim can still be published, after a request to publish
        it failed with `error`. `found`: pointer that was read after this error."""
        replaced = claim.replaced
        if replaced is not None:
            # The version of the pointer does not matter: `end` may have changed it.
            return found is not None and found.is_published and found.id == replaced.id
        if found is not None:
            return not found.is_published and (found.id == claim.attempt_id or end_other(found.id))
        # A `manifest.json` that is not a pointer belongs to a checkpoint that another tool has
        # copied there.
        return isinstance(error, UnansweredError) or not self._has_manifest(claim.name)

    def _has_manifest(self, name: str) -> bool:
        with suppress(NotFoundError):
            self._bucket.head(_marker(name))
            return True
        return False

    def end(self, name: str, attempt_id: str) -> None:
        """Make sure that no request publishes an attempt from now on, not even a request that was
        sent already. The caller must hold the attempt.

        Raises:
            NotFoundError: the attempt is published.
        """
        first: Pointer | None = None
        for _ in range(_TRIES):
            found = self._pointers.read(name)
            if found is not None and found.id == attempt_id:
                if found.is_published:
                    raise NotFoundError(f"`{self._where(name)}` is attempt {attempt_id}")
                self._bucket.delete([_marker(name)])
                self._pointers.forget(name)
                return
            if found is None or not found.is_published:
                return  # There is no checkpoint that the attempt could replace.
            if first is not None and found.version != first.version:
                return
            first = found
            with suppress(TakenError, UnansweredError):
                self._bucket.put_over(_marker(name), encode_pointer(found.id), found.version)
                self._pointers.forget(name)
                return
            pause()
        raise StorageError(f"`{self._where(name)}` could not be changed: the store is busy")

    def _found_after(self, name: str, error: Exception) -> Pointer | None:
        try:
            return self._pointers.read(name)
        except HoldfastError:
            raise StorageError(
                f"`{self._where(name)}`: the store does not say whether it was published: {error}",
                hint="list the folder once the store answers",
            ) from error

    def _where(self, name: str) -> str:
        return f"{self._bucket.url}/{name}"


def _marker(name: str) -> str:
    """Return the key of the pointer of checkpoint `name`. A reservation of the name has the same
    key."""
    return f"{name}/{MANIFEST}"
