"""Publish attempts in a bucket, so that no request takes effect after its attempt is given up.

A client may give up a request that the store receives later, or a process may die with a request
on its way. Such a request must not publish an attempt whose files are deleted by then. So the
pointer of a checkpoint is never put without a condition that can be withdrawn:

* A save to a free name first reserves the name: it puts an object that names its attempt, if there
  is none. The pointer then replaces this version of the reservation.
* A save that replaces a checkpoint replaces the version of its pointer.

Whoever deletes the files of an attempt first ends its claim (`Claims.end`): deletes the
reservation, or puts the pointer that it would replace once more, as another version. No two
versions are equal, so the condition of a request that is still on its way never holds again.
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
"""Most times that a conditional request is sent."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of one attempt on a name."""

    name: str
    """Name of the checkpoint, with the folders above it."""

    attempt_id: str

    replaced: Pointer | None
    """The checkpoint to replace, which the caller holds; None if the name must be free."""


class Claims:
    """The claims on the names in a bucket."""

    def __init__(self, bucket: Bucket, pointers: Pointers) -> None:
        self._bucket, self._pointers = bucket, pointers

    def publish(self, claim: Claim, check: Check, end_other: Callable[[str], bool]) -> None:
        """Publish an attempt.

        `check`: raises an error if this process does not hold the attempt any more. `end_other`:
        ends the claim of another attempt, given its ID, if nobody holds that one; returns whether
        it did.

        Raises:
            ExistsError: the name is taken, or is reserved by a save that runs.
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
                # Another attempt is published, or the answer to our request was lost, or it was.
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
        """Whether an attempt can still be published, after a request failed and `found` was read
        under its name."""
        replaced = claim.replaced
        if replaced is not None:
            # Another version of it is the work of `end`.
            return found is not None and found.is_published and found.id == replaced.id
        if found is not None:
            return not found.is_published and (found.id == claim.attempt_id or end_other(found.id))
        # Without a pointer, the manifest of a checkpoint that another tool has copied there.
        return isinstance(error, UnansweredError) or not self._has_manifest(claim.name)

    def _has_manifest(self, name: str) -> bool:
        with suppress(NotFoundError):
            self._bucket.head(_marker(name))
            return True
        return False

    def end(self, name: str, attempt_id: str) -> None:
        """Make sure that no request of an attempt, which the caller holds, can publish it from now
        on, not even one that is still on its way.

        Raises:
            NotFoundError: it is published.
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
                return  # The checkpoint that the attempt was to replace is deleted.
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
    """Key of the pointer of a checkpoint, or of the reservation of its name."""
    return f"{name}/{MANIFEST}"
