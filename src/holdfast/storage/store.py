"""The interface of a store of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Check = Callable[[], None]
"""Function that raises an error if this process has lost the lock."""

Buffer = bytes | bytearray | memoryview


class FileWriter(Protocol):
    """A file, open for writing."""

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Write the parts one after the other from `offset` on. Ranges never overlap.

        The parts must not change until the file's context ends: they may be read until then.
        """
        ...


class FileReader(Protocol):
    """A file, open for reading."""

    def read_into(self, start: int, target: memoryview) -> int:
        """Fill `target` from `start` on. Return the bytes read; fewer only if the file ends."""
        ...


class ReadStore(Protocol):
    """A tree of files to read from. Keys are paths relative to its root, with `/` as separator.

    Every method may raise `StorageError`, and `NotFoundError` if nothing has the key.
    """

    @property
    def url(self) -> str:
        """Path or URL of the root."""
        ...

    def list(self, folder: str = "") -> Sequence[str]:
        """List the names directly in a folder, sorted. Names of folders end in `/`."""
        ...

    def size(self, key: str) -> int:
        """Return the size of a file in bytes."""
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` of a file; fewer only if the file ends before."""
        ...

    def open(self, key: str) -> AbstractContextManager[FileReader]:
        """Open a file to read many ranges. Raises `NotFoundError` here or at the first read."""
        ...

    def leads_out(self, folder: str, file: str) -> bool:
        """Whether a file of a folder is a link to a place outside of that folder. False if the
        store has no links."""
        ...


class Store(ReadStore, Protocol):
    """A tree of files to keep checkpoints in.

    The effect of a method is durable only where its docstring says so. After a crash, anything
    else may be lost, kept, or kept in part.
    """

    def create(self, key: str, nbytes: int) -> AbstractContextManager[FileWriter]:
        """Create a file of `nbytes`, with its space reserved.

        When the context ends without error, the content is durable; `sync` the folder to make the
        name durable too. When it ends in an error, the file is incomplete.
        """
        ...

    def make_folder(self, key: str) -> None:
        """Create an empty folder."""
        ...

    def sync(self, folder: str) -> None:
        """Make the names in a folder durable."""
        ...

    def publish(self, folder: str, name: str, *, replace: bool = False) -> None:
        """Give a hidden folder, such as a complete attempt, the name of its checkpoint.

        Atomic: readers find no checkpoint, or the whole one. Durable on return.

        `replace`: the checkpoint that has the name now, which the caller holds, gives way to the
        new one. A killed process leaves one of the two under this name, or the old one in a
        `.replaced` folder.

        Raises:
            ExistsError: the name is taken, even if another process took it just now.
        """
        ...

    def unpublish(self, name: str, removing: str) -> str:
        """Take the name of a checkpoint, or of a hidden folder, away. Return the folder that has
        its files now: `removing`, or another hidden folder of the same checkpoint.

        Atomic: readers find the whole checkpoint, or none. Durable on return.
        """
        ...

    def remove(self, key: str) -> None:
        """Delete a file, or a folder with everything in it."""
        ...

    def free_bytes(self) -> int | None:
        """Return the free space in bytes; None if no limit is known."""
        ...

    def lock(self, key: str, note: str) -> AbstractContextManager[Check]:
        """Lock `key` until the context ends or the process dies. `note` describes the holder.

        The context gives a function that checks whether this process still holds the lock. It
        locks again if the file is gone and no other process has locked one in its place.

        Raises:
            ExistsError: another process holds the lock, now or when the check is called; the
                message quotes its note.
        """
        ...

    def holder(self, key: str) -> str | None:
        """Return the note of the holder of the lock `key`; None if no holder is visible from this
        machine. Does not take the lock."""
        ...

    def hold(self, key: str) -> AbstractContextManager[bool | None]:
        """Hold a file or folder, across renames, until the context ends or the process dies.

        The context gives True if this caller holds it, False if another does, None if the store
        cannot tell. A hold does not prevent anything by itself: whoever removes or replaces a
        folder must hold it first, and must leave folders alone that others hold.

        Raises:
            NotFoundError: nothing has the key.
        """
        ...


class Creating(Protocol):
    """A place to create files in."""

    def create(self, key: str, nbytes: int) -> AbstractContextManager[FileWriter]:
        """Like `Store.create`."""
        ...


@runtime_checkable
class FolderStore(Store, Protocol):
    """A store of real folders: files can be changed in place, and everything can be renamed."""

    def rename(self, source: str, target: str) -> None:
        """Move a file or folder to a free name, atomically. Durable on return.

        Raises:
            ExistsError: the name is taken, even if another process took it just now.
        """
        ...

    def amend(self, key: str) -> AbstractContextManager[FileWriter]:
        """Open an existing file of full length; several processes may write parts of it.

        The bytes that this process wrote are durable when the context ends without error.
        """
        ...

    def replace_file(self, source: str, target: str) -> None:
        """Move a file to a name that another file may have, atomically. Durable on return."""
        ...


@runtime_checkable
class Joining(Protocol):
    """The part of a store that lets several processes of one host write into a new file."""

    def join(self, key: str) -> AbstractContextManager[FileWriter]:
        """Open a file that another process has created and not ended yet, to write a part of it.

        When the context ends without error, the part is written. It becomes durable when the
        context of `create` ends after that.
        """
        ...


@dataclass(frozen=True, slots=True)
class Links:
    """The names of one file."""

    file: str
    """Identity of the file: equal for all of its names."""

    count: int
    """Number of its names."""


@runtime_checkable
class Linking(Protocol):
    """The part of a store that gives one file several names, so that it is stored once.

    The file is deleted with its last name.
    """

    def link(self, source: str, target: str) -> None:
        """Give the file `source` the further name `target`, which must be free. Sync the folder of
        `target` to make the name durable.

        Raises:
            NotFoundError: nothing has the key `source`.
            StorageError: the store cannot link this file.
        """
        ...

    def links(self, key: str) -> Links:
        """Return the identity of a file, and the number of its names."""
        ...

    def evict(self, key: str) -> None:
        """Drop what memory caches of a durable file, so that it is next read from the disk."""
        ...


@runtime_checkable
class LinkListing(Protocol):
    """A store of files that may be symbolic links."""

    def list_with_links(self, folder: str) -> tuple[Sequence[str], Collection[str]]:
        """Return the result of `list`, and the names of those that are symbolic links."""
        ...


@runtime_checkable
class Stamping(Protocol):
    """The part of a store that tells when a folder has changed, without reading its files."""

    def stamp(self, folder: str) -> object:
        """Return a value that changes when any file directly in `folder` changes."""
        ...

    def changed_at(self, folder: str) -> float:
        """Return when `folder` or a file directly in it last changed, in seconds since 1970."""
        ...


@runtime_checkable
class Copying(Protocol):
    """The part of a store that copies a file by itself, so that its bytes are not sent again. They
    are stored twice."""

    def copy(self, source: str, target: str) -> None:
        """Copy the file `source` to `target`, which must be free. The copy is durable then.

        Raises:
            NotFoundError: nothing has the key `source`.
            StorageError: the store cannot copy this file.
        """
        ...


@runtime_checkable
class Distant(Protocol):
    """The part of a store that is reached over a network: each request waits for an answer."""

    @property
    def request_bytes(self) -> int:
        """Bytes of one request for data, a multiple of 1 MiB. Smaller requests mostly wait."""
        ...


class PlainReader:
    """A `FileReader` for stores without open files. Each read names the key again."""

    def __init__(self, store: ReadStore, key: str) -> None:
        self._store, self._key = store, key

    def read_into(self, start: int, target: memoryview) -> int:
        data = self._store.read(self._key, start, start + len(target))
        target[: len(data)] = data
        return len(data)

    def __enter__(self) -> PlainReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass
