"""The interface of a store of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Check = Callable[[], None]
"""Function that raises an error if this process has lost a lock that it took."""

Buffer = bytes | bytearray | memoryview


class FileWriter(Protocol):
    """A file, open for writing."""

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Write the parts one after the other from `offset` on. Ranges of two calls never overlap.

        The parts must not change until the file's context ends, since they may be read until then.
        """
        ...


class FileReader(Protocol):
    """A file, open for reading."""

    def read_into(self, start: int, target: memoryview) -> int:
        """Fill `target` with the bytes of the file from `start` on. Return the number of bytes
        read, which is smaller than `target` only if the file ends first."""
        ...


class ReadStore(Protocol):
    """A tree of files to read from. Keys are paths relative to its root, with `/` as separator.

    Every method may raise `StorageError`, and `NotFoundError` if there is nothing with this key.
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
        """Return bytes `start` to `stop` of a file, or fewer if the file ends earlier."""
        ...

    def open(self, key: str) -> AbstractContextManager[FileReader]:
        """Open a file to read many ranges. Raises `NotFoundError` here or at the first read."""
        ...

    def leads_out(self, folder: str, file: str) -> bool:
        """Return whether a file in a folder is a link to a place outside of that folder. False if
        the store has no links."""
        ...


class Store(ReadStore, Protocol):
    """A tree of files to keep checkpoints in.

    The effect of a method is durable only where its docstring says so. After a crash, anything
    else may be lost, kept, or kept in part.
    """

    def create(self, key: str, nbytes: int) -> AbstractContextManager[FileWriter]:
        """Create a file of `nbytes`, with its space reserved.

        When the context ends without error, the content is durable. Call `sync` for the folder to
        make the name durable too. When the context ends in an error, the file is incomplete.
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

        `replace`: the new checkpoint takes the place of the one with this name, which the caller
        holds. If the process is killed, one of the two checkpoints has this name, or the old one is
        in a `.replaced` folder.

        Raises:
            ExistsError: the name is taken, even if another process took it just now.
        """
        ...

    def unpublish(self, name: str, removing: str) -> str:
        """Take the name away from a checkpoint, or from a hidden folder. Return the hidden folder
        that has the files now: `removing`, or another one of the same checkpoint.

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

        The context gives a function that checks whether this process still holds the lock. If the
        lock's file is gone and no other process has locked a new one, the function locks again.

        Raises:
            ExistsError: another process holds the lock, now or when the function is called. The
                message quotes the note of that process.
        """
        ...

    def holder(self, key: str) -> str | None:
        """Return the note of the holder of the lock `key`; None if no holder is visible from this
        machine. Does not take the lock."""
        ...

    def hold(self, key: str) -> AbstractContextManager[bool | None]:
        """Hold a file or folder, across renames, until the context ends or the process dies.

        The context gives True if this caller holds it, False if another one does, None if the store
        cannot tell. A hold by itself prevents nothing. So code that removes or replaces a folder
        must hold the folder first, and must not touch folders that others hold.

        Raises:
            NotFoundError: there is nothing with this key.
        """
        ...


class Creating(Protocol):
    """Anything that can create files, such as a `Store`."""

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
        """Open a file that has its full length already, to write parts of it. Several processes may
        write to it at the same time.

        The bytes that this process wrote are durable when the context ends without error.
        """
        ...

    def replace_file(self, source: str, target: str) -> None:
        """Move a file to a name that another file may have, atomically. Durable on return."""
        ...


@runtime_checkable
class Joining(Protocol):
    """A store in which several processes of one host can write into a new file."""

    def join(self, key: str) -> AbstractContextManager[FileWriter]:
        """Open a file to write a part of it, while another process is in the context of `create`
        for this file.

        When the context ends without error, the part is written. The part becomes durable when the
        context of `create` ends, which must be later.
        """
        ...


@dataclass(frozen=True, slots=True)
class Links:
    """Identity of one file, and the number of its names."""

    file: str
    """Identity of the file: equal for all of its names."""

    count: int
    """Number of the file's names."""


@runtime_checkable
class Linking(Protocol):
    """A store that can give one file several names, so that the file is stored only once.

    The file is deleted with its last name.
    """

    def link(self, source: str, target: str) -> None:
        """Give the file `source` the further name `target`, which must be free. Sync the folder of
        `target` to make the name durable.

        Raises:
            NotFoundError: there is nothing with the key `source`.
            StorageError: the store cannot link this file.
        """
        ...

    def links(self, key: str) -> Links:
        """Return the identity of a file, such as its inode, and the number of its hard links."""
        ...

    def evict(self, key: str) -> None:
        """Drop a durable file from the page cache, so that the next read comes from the disk."""
        ...


@runtime_checkable
class LinkListing(Protocol):
    """A store whose files may be symbolic links."""

    def list_with_links(self, folder: str) -> tuple[Sequence[str], Collection[str]]:
        """Return the result of `list`, and the names of the symbolic links among them."""
        ...


@runtime_checkable
class Stamping(Protocol):
    """A store that can tell when a folder has changed, without reading the folder's files."""

    def stamp(self, folder: str) -> object:
        """Return a value that changes when any file directly in `folder` changes."""
        ...

    def changed_at(self, key: str) -> float:
        """Return when a file, or a folder or a file directly in it, last changed, in seconds since
        1970."""
        ...


@runtime_checkable
class Copying(Protocol):
    """A store that can copy a file by itself, so that this process does not send the bytes again.
    The copy takes up space of its own."""

    def copy(self, source: str, target: str) -> None:
        """Copy the file `source` to `target`, which must be free. The copy is durable on return.

        Raises:
            NotFoundError: there is nothing with the key `source`.
            StorageError: the store cannot copy this file.
        """
        ...


@runtime_checkable
class Replacing(Store, Protocol):
    """A store that can replace a file as a whole."""

    def replace(self, key: str, nbytes: int) -> AbstractContextManager[FileWriter]:
        """Like `create`, but the file may exist. Readers find the earlier file until the context
        ends without error, then the new one."""
        ...


@runtime_checkable
class Refusing(Protocol):
    """A store that can neither replace nor delete some of its folders."""

    def why_fixed(self, folder: str) -> str | None:
        """Return why the store cannot replace or delete a folder; None if it can."""
        ...


@runtime_checkable
class Addressing(Protocol):
    """A store in which other programs find the files of a folder at another address."""

    def address(self, folder: str) -> str:
        """Return the URL below which other programs find the files that are in `folder` now."""
        ...


@runtime_checkable
class Distant(Protocol):
    """A store that is reached over a network, so that each request waits for an answer."""

    @property
    def request_bytes(self) -> int:
        """Best size of a request for data, in bytes: a multiple of 1 MiB. With smaller requests,
        most of the time is spent waiting for answers."""
        ...


class PlainReader:
    """A `FileReader` for stores that cannot open files. Each read passes the key again."""

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
