"""A `Store` in a bucket of an object store: S3, Google Cloud Storage, Azure.

A bucket has no folders and no renames. So the files of checkpoint `NAME` are in `NAME/ID/`, with an
ID per attempt. A small object, the pointer `NAME/manifest.json`, says which ID is published. One
conditional request puts the pointer last, which publishes the checkpoint (`storage/claims.py`):

    step-5/1f2e3d4c/__0_0.distcp    files of the attempt `.attempt-step-5-1f2e3d4c`
    step-5/1f2e3d4c/.metadata
    step-5/1f2e3d4c/manifest.json
    step-5/manifest.json            pointer; from now on `step-5` is this attempt
    step-5/.metadata                for readers of stock DCP, which do not read pointers

`ObjectStore` shows these objects as files in folders. `step-5/__0_0.distcp` is the object
`step-5/1f2e3d4c/__0_0.distcp` while the pointer names that ID. An ID that no pointer names is shown
as the folder `.attempt-step-5-ID` while a lease protects it, otherwise as `.removing-step-5-ID`.
Locks and holds are leases (`storage/bucket_leases.py`).
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import TypeVar

from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError
from holdfast.format.names import (
    MANIFEST,
    METADATA,
    HiddenFolder,
    held_file,
    held_of,
    hidden_folder_of,
)
from holdfast.format.pointer import POINTER_BYTES_MAX, is_id
from holdfast.storage.bucket import Bucket, Listing, StoredObject
from holdfast.storage.bucket_leases import (
    LEASE_S,
    NOTE_BYTES_MAX,
    BucketLease,
    BucketLeases,
    Holder,
    check,
    note_in,
)
from holdfast.storage.claims import Claim, Claims
from holdfast.storage.listed_bucket import ListedBucket
from holdfast.storage.pointers import Pointer, Pointers
from holdfast.storage.store import Check, FileWriter
from holdfast.storage.streams import PART_BYTES, ObjectReader, ObjectWriter

logger: logging.Logger = logging.getLogger("holdfast")

T = TypeVar("T")
U = TypeVar("U")

THREADS = 16
"""Maximum number of requests that are sent at the same time."""

_LEASES_SHOWN = 10
"""Age, as a multiple of `LEASE_S`, from which a lease's object is listed, so that a cleanup deletes
it."""

_POLLS = 20
"""Number of times per `LEASE_S` that a process checks a lease for which it waits."""

_NO_ID = "00000000"
"""ID in the name of the hidden folder that shows a left-over `.metadata` without an attempt."""

_COPIED = "copy it to another place with the tool of that store, then delete it there"


class ObjectStore:
    """The objects below one prefix of a bucket, as a tree of files."""

    def __init__(self, bucket: Bucket, *, threads: int = THREADS) -> None:
        """`threads`: maximum number of requests that are sent at the same time."""
        self._bucket, self._num_threads = bucket, threads
        self._leases = BucketLeases(bucket)
        self._pointers = Pointers(bucket)
        self._claims = Claims(bucket, self._pointers)
        self._replaced: dict[str, Pointer] = {}
        """Pointer of each checkpoint that this store holds."""

    @property
    def url(self) -> str:
        return self._bucket.url

    # ------------------------------------------------------------------------------------ reading

    def list(self, folder: str = "") -> Sequence[str]:
        folder = folder.rstrip("/")
        prefix = self._folder(folder)
        listing = self._bucket.list(prefix)
        files = {_name(found.key) for found in listing.objects}
        names = {_name(found.key) for found in listing.objects if not self._is_lease(found)}
        if folder and prefix == folder:
            if self._is_reserved(folder):
                files, names = files - {MANIFEST}, names - {MANIFEST}
            if _holds_attempts_only(files, listing.prefixes):
                raise NotFoundError(f"nothing at `{self._where(folder)}`")
        prefixes = [_join(prefix, name) for name in listing.prefixes]
        shown = self._in_threads(partial(self._shown, beside=files), prefixes)
        return sorted(names.union(*shown))

    def _is_lease(self, found: StoredObject) -> bool:
        """Return whether an object is the lease of a hold that may still be in use. The age of the
        lease is approximate, since the clocks of this machine and the store may differ."""
        age_s = time.time() - found.modified.timestamp()
        return held_of(_name(found.key)) is not None and age_s < _LEASES_SHOWN * LEASE_S

    def _shown(self, prefix: str, beside: set[str]) -> set[str]:
        """Return the names of the folders that a listing shows for one prefix, with `/` at the end:
        the prefix itself, hidden folders, or both. `beside`: names of the objects beside it."""
        listing, name = self._bucket.list(prefix), _name(prefix)
        ids = {name for name in listing.prefixes if is_id(name)}
        files = {_name(found.key) for found in listing.objects}
        if files == {METADATA} and not listing.prefixes and self._pointers.is_left_over(prefix):
            # A process was killed while it deleted the checkpoint. Only `.metadata` is left.
            return {f"{HiddenFolder('removing', name, _NO_ID)}/"}
        pointer, published = self._pointer_in(prefix, listing), None
        if pointer is not None and pointer.is_published:
            published = pointer.id
        elif pointer is not None:
            # Show the attempt that has reserved the name, even if it has no files any more.
            ids, files = ids | {pointer.id}, files - {MANIFEST}
        if not ids:
            return {f"{name}/"}
        shown = set()
        for attempt_id in ids - {published}:
            hidden = HiddenFolder("attempt", name, attempt_id)
            if held_file(str(hidden)) not in beside:
                hidden = HiddenFolder("removing", name, attempt_id)
            shown.add(f"{hidden}/")
        if published or not _holds_attempts_only(files, listing.prefixes):
            shown.add(f"{name}/")
        return shown

    def _pointer_in(self, prefix: str, listing: Listing) -> Pointer | None:
        """Return the pointer of a prefix, given the prefix's listing; None if it has no pointer."""
        for found in listing.objects:
            if _name(found.key) == MANIFEST and found.nbytes <= POINTER_BYTES_MAX:
                return self._pointers.of(prefix, version=found.version)
        return None

    def size(self, key: str) -> int:
        return self._read(key, self._bucket.head).nbytes

    def read(self, key: str, start: int, stop: int) -> bytes:
        if start >= stop:
            self.size(key)
            return b""
        return bytes(self._read(key, lambda found: self._bucket.get_range(found, start, stop)))

    @property
    def request_bytes(self) -> int:
        return PART_BYTES

    def open(self, key: str) -> ObjectReader:
        def read(start: int, target: memoryview) -> int:
            return self._read(key, lambda found: self._bucket.get_into(found, start, target))

        return ObjectReader(read, self._threads)

    def leads_out(self, folder: str, file: str) -> bool:  # noqa: ARG002 - there are no links
        return False

    def _read(self, key: str, request: Callable[[str], T]) -> T:
        """Call `request` with the key of the object that is shown as the file `key`. If the file's
        checkpoint was replaced meanwhile, call it again, with the key of the new file."""
        found = self._key(key, fresh=_name(key) == MANIFEST)
        try:
            return request(found)
        except NotFoundError:
            again = self._key(key, fresh=True)
            if again == found:
                raise
        return request(again)

    def stamp(self, folder: str) -> object:
        return [
            (_name(found.key), found.nbytes, found.version, found.modified)
            for found in self._bucket.list(self._folder(folder, fresh=False)).objects
        ]

    def changed_at(self, key: str) -> float:
        found = self._bucket.list(self._folder(key, fresh=False)).objects
        if not found:
            found = [self._read(key, self._bucket.head)]
        return max(one.modified.timestamp() for one in found)

    def listed(self, below: str | None = None) -> tuple[ObjectStore, Callable[[], None]]:
        """Return a store of the same objects for a reader that checks them again and again. Also
        return a function that the reader calls before each check. `below`: see `ListedBucket`."""
        bucket = ListedBucket(self._bucket, below)
        return ObjectStore(bucket, threads=1), bucket.refresh

    # ---------------------------------------------------------------------------------- addresses

    def _key(self, key: str, *, fresh: bool = False) -> str:
        """Return the key of the object that this store shows as the file `key`. `fresh`: read the
        pointer again, even if it is remembered."""
        folder, _, name = key.rpartition("/")
        prefix = self._folder(folder, fresh=fresh)
        if name == MANIFEST and folder and prefix == folder and self._is_reserved(folder):
            raise NotFoundError(f"nothing at `{self._where(key)}`")
        return _join(prefix, name)

    def _is_reserved(self, folder: str) -> bool:
        """Return whether a name is reserved for an attempt, according to the last known pointer."""
        pointer = self._pointers.of(folder)
        return pointer is not None and not pointer.is_published

    def _folder(self, folder: str, *, fresh: bool = True) -> str:
        """Return the prefix of the objects that this store shows as the files in `folder`. `fresh`:
        read the pointer again, even if it is remembered."""
        parts = folder.split("/") if folder else []
        for place, part in enumerate(parts):
            hidden = hidden_folder_of(part)
            if hidden is not None and hidden.role != "replaced":
                return "/".join([*parts[:place], hidden.name, hidden.id, *parts[place + 1 :]])
        for length in range(len(parts), 0, -1):
            above = "/".join(parts[:length])
            pointer = self._pointers.of(above, fresh=fresh)
            if pointer is not None and pointer.is_published:
                return "/".join([above, pointer.id, *parts[length:]])
        return folder

    def address(self, folder: str) -> str:
        return self._where(self._folder(folder))

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}".rstrip("/")

    # ------------------------------------------------------------------------------------ writing

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[FileWriter]:
        found = self._key(key)
        with ObjectWriter(self._bucket, found, nbytes, self._where(key)) as writer:
            yield writer

    @contextmanager
    def replace(self, key: str, nbytes: int) -> Iterator[FileWriter]:
        where = self._where(key)
        with ObjectWriter(self._bucket, self._key(key), nbytes, where, replaces=True) as writer:
            yield writer

    def copy(self, source: str, target: str) -> None:
        found = self._key(target)
        with suppress(NotFoundError):
            self._bucket.head(found)
            raise StorageError(f"`{self._where(target)}` exists already")
        self._read(source, lambda key: self._bucket.copy(key, found))

    def make_folder(self, key: str) -> None:
        """If `key` is the root, check that the bucket answers, and that it supports saves. Do
        nothing for other folders, which exist while they hold files or while an attempt is held."""
        if not key:
            self._bucket.list("")
            self._leases.check_conditions()

    def sync(self, folder: str) -> None:
        """Do nothing: an object is durable once it is put."""

    def publish(self, folder: str, name: str, *, replace: bool = False) -> None:
        attempt = hidden_folder_of(_name(folder))
        assert attempt is not None, f"{folder} is no attempt"
        replaced = (self._replaced.get(name) or self._pointer_of(name)) if replace else None
        self._claims.publish(
            Claim(name, attempt.id, replaced),
            check=partial(self._check_lease, folder),
            end_other=partial(self._end_dead_claim, name),
        )
        self._pointers.forget(name)
        self._replaced.pop(name, None)
        try:
            self._pointers.write_stock_index(name)
        except HoldfastError as error:
            # The checkpoint is published anyway. The next cleanup or save of this name writes the
            # index.
            logger.warning("`%s` is saved, but stock DCP cannot read it: %s", name, error)

    def _end_dead_claim(self, name: str, attempt_id: str) -> bool:
        """End the claim of an attempt if no process holds the attempt. Return whether the claim has
        ended."""
        above, _, last = name.rpartition("/")
        with (
            suppress(NotFoundError),
            self.hold(_join(above, str(HiddenFolder("attempt", last, attempt_id)))) as held,
        ):
            if held is False:
                return False
            self._claims.end(name, attempt_id)
        return True

    def why_fixed(self, folder: str) -> str | None:
        pointer = self._pointers.read(folder)
        if hidden_folder_of(_name(folder)) or (pointer is not None and pointer.is_published):
            return None
        self._bucket_has(folder)
        return "it was copied here, not saved by Holdfast"

    def _pointer_of(self, name: str) -> Pointer:
        """Return the pointer of a checkpoint that is to be replaced or unpublished."""
        pointer = self._pointers.read(name)
        if pointer is None or not pointer.is_published:
            self._bucket_has(name)
            raise StorageError(
                f"`{self._where(name)}` was copied here, not saved by Holdfast: its name cannot be "
                "taken away in one step",
                hint=_COPIED,
            )
        return pointer

    def _bucket_has(self, name: str) -> None:
        """Raise a NotFoundError if only attempts, or no objects, are below this prefix."""
        self.list(name)

    def unpublish(self, name: str, removing: str) -> str:  # noqa: ARG002 - the ID stays
        hidden = hidden_folder_of(_name(name))
        above = name.rpartition("/")[0]
        if hidden is not None:
            # The folder is hidden already: no pointer names it.
            return _join(above, str(HiddenFolder("removing", hidden.name, hidden.id)))
        pointer = self._pointer_of(name)
        # Delete the index of stock DCP first. If deleting the pointer then fails, write the index
        # again.
        self._bucket.delete([_join(name, METADATA)])
        try:
            self._check_lease(name)
            self._bucket.delete([_join(name, MANIFEST)])
        except HoldfastError:
            with suppress(HoldfastError):
                self._pointers.write_stock_index(name)
            raise
        self._pointers.forget(name)
        self._replaced.pop(name, None)
        return _join(above, str(HiddenFolder("removing", _name(name), pointer.id)))

    def remove(self, key: str) -> None:
        hidden = hidden_folder_of(_name(key))
        if hidden is None:
            with suppress(NotFoundError):
                found = self._key(key)
                self._bucket.head(found)
                self._bucket.delete([found])
                return
            key = self.unpublish(key, key)
            hidden = hidden_folder_of(_name(key))
        prefix = self._folder(key)
        if hidden is not None:
            name = _join(key.rpartition("/")[0], hidden.name)
            # If the attempt is published, `end` raises an error: a save that fails after publishing
            # must not delete the files.
            self._claims.end(name, hidden.id)
            # If a save or a deletion was killed, the index of stock DCP may still lead to the
            # files that are deleted now. So write it anew, or delete it.
            self._pointers.write_stock_index(name)
        keys = [found.key for found in self._bucket.list_all(prefix)]
        if not keys:
            raise NotFoundError(f"nothing at `{self._where(key)}`")
        # Delete the manifest first. Otherwise a reader of this very prefix could take what is left
        # for a complete checkpoint.
        first = [found for found in keys if _name(found) in (MANIFEST, METADATA)]
        self._bucket.delete(first)
        self._bucket.delete([found for found in keys if found not in first])

    def free_bytes(self) -> int | None:
        return None

    # -------------------------------------------------------------------------- locks and holds

    @contextmanager
    def lock(self, key: str, note: str) -> Iterator[Check]:
        lease = self._leases.new(key, note)
        holder = lease.take()
        if holder is not None:
            # Collect garbage, since an unreferenced manager of this process may hold the lock.
            gc.collect()
            holder = lease.take()
        if holder is not None:
            self._wait_for(lease, holder)
        self._leases.keep(key, lease)
        try:
            yield lambda: check(lease, "stop this run: another one may have taken its folder")
        finally:
            self._leases.release(key, lease)

    def _wait_for(self, lease: BucketLease, holder: Holder) -> None:
        """Wait until the lease of another process lapses, then take it. Raises an ExistsError if
        that process renews the lease."""
        until = time.monotonic() + 2 * LEASE_S
        while not holder.is_alive and time.monotonic() < until:
            time.sleep(LEASE_S / _POLLS)
            found = lease.take()
            if found is None:
                return
            if found.version != holder.version:
                break
        raise ExistsError(
            f"`{self.url}` is in use by another run: {holder.note}",
            hint="wait for that run or stop it, or give this one another folder",
        )

    def holder(self, key: str) -> str | None:
        try:
            data, found = self._bucket.get(key, NOTE_BYTES_MAX)
        except NotFoundError:
            return None
        # The age is approximate: the clocks of this machine and the store may differ.
        is_old = time.time() - found.modified.timestamp() > 2 * LEASE_S
        return None if is_old else note_in(data)

    @contextmanager
    def hold(self, key: str) -> Iterator[bool | None]:
        hidden = hidden_folder_of(_name(key))
        if hidden is None:
            self._check_exists(key)
        lease_key = _lease_key(key)
        lease = self._leases.new(lease_key, f"a save or a cleanup of `{key}`")
        if self._leases.held(lease_key) is not None or lease.take() is not None:
            yield False
            return
        self._leases.keep(lease_key, lease)
        try:
            if hidden is None:
                self._remember(key)
            else:
                self._check_unpublished(key.rpartition("/")[0], hidden)
            yield True
        finally:
            self._leases.release(lease_key, lease)
            self._replaced.pop(key, None)

    def _check_exists(self, key: str) -> None:
        pointer = self._pointers.read(key)
        if pointer is None or not pointer.is_published:
            self._bucket_has(key)

    def _remember(self, name: str) -> None:
        """Remember the pointer of a checkpoint, so that `publish` replaces this checkpoint and
        no later one."""
        pointer = self._pointers.read(name)
        if pointer is not None and pointer.is_published:
            self._replaced[name] = pointer

    def _check_unpublished(self, above: str, hidden: HiddenFolder) -> None:
        """Raise a NotFoundError if a pointer names the folder `hidden` below `above`: then it is
        published. A listing that misses recent changes may still show it as hidden."""
        pointer = self._pointers.read(_join(above, hidden.name))
        if pointer is not None and pointer.is_published and pointer.id == hidden.id:
            raise NotFoundError(f"`{hidden}` is published")

    def _check_lease(self, key: str) -> None:
        """If this store took a lease on a checkpoint or an attempt, check that it still has the
        lease."""
        lease = self._leases.held(_lease_key(key))
        if lease is not None:
            check(lease, "save again: a cleanup may have deleted a part of this attempt")

    # ------------------------------------------------------------------------------------ threads

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="holdfast-request")

    def _in_threads(self, request: Callable[[T], U], items: Sequence[T]) -> Sequence[U]:
        """Send a request for each item, several at a time. Return the results in order."""
        if min(len(items), self._num_threads) < 2:
            return [request(item) for item in items]
        return [*self._threads.map(request, items)]


def _holds_attempts_only(files: Collection[str], prefixes: Collection[str]) -> bool:
    """Return whether only attempts are directly below a prefix without a pointer. If so, the prefix
    is not shown as a folder. An index of stock DCP does not count: a deletion may have left it."""
    return not {*files} - {METADATA} and all(map(is_id, prefixes))


def _lease_key(key: str) -> str:
    """Return the key of the lease on a checkpoint or an attempt."""
    folder, _, name = key.rpartition("/")
    hidden = hidden_folder_of(name)
    # An attempt keeps its lease when it is shown as `.removing`.
    held = str(HiddenFolder("attempt", hidden.name, hidden.id)) if hidden else name
    return _join(folder, held_file(held))


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name
