"""The `Store`: what Holdfast asks of a place that keeps checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

Check = Callable[[], None]
"""Raises an error where something no longer holds."""

Buffer = bytes | bytearray | memoryview


class Writer(Protocol):
    """One new file, open for writing."""

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Write the parts one after the other from `offset` on. Ranges never overlap.

        The parts must stay as they are until the file's context ends: they may be read until then.
        """
        ...


class Reader(Protocol):
    """One file, open for reading."""

    def read_into(self, start: int, target: memoryview) -> int:
        """As `ReadStore.read_into`, of this file."""
        ...


class ReadStore(Protocol):
    """A tree of files to read from. Keys are paths relative to its root, `/` between their parts.

    Every method may raise `StorageError`; what is not there is `NotFoundError`.
    """

    @property
    def url(self) -> str:
        """Root of the tree, as a person would write it."""
        ...

    def list(self, folder: str = "") -> Sequence[str]:
        """Names directly in a folder, sorted; the names of folders end in `/`."""
        ...

    def size(self, key: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file, fewer only where the file ends."""
        ...

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        """Fill `target` from `start` on. Returns the bytes read, fewer only where the file ends."""
        ...

    def open(self, key: str) -> AbstractContextManager[Reader]:
        """A file of which many ranges are to be read. One that is not there may be found out here,
        or by the first of them."""
        ...

    def leads_out(self, folder: str, file: str) -> bool:
        """Whether a file of a folder is a link to a place outside of that folder. False where there
        are no links."""
        ...


class Store(ReadStore, Protocol):
    """A tree of files to keep checkpoints in.

    What a method has done is durable only where it says so: a crash may lose anything else, keep
    it, or keep it in part.
    """

    def create(self, key: str, nbytes: int) -> AbstractContextManager[Writer]:
        """A new file of `nbytes`, its space reserved. Durable when the context ends well, but for
        its name: `sync` its folder. When the context ends in an error the file is incomplete."""
        ...

    def make_folder(self, key: str) -> None:
        """A new, empty folder."""
        ...

    def sync(self, folder: str) -> None:
        """Make the names in a folder durable."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Move a file or folder under a name that is free, at one instant. Durable on return.

        Raises:
            ExistsError: the name is taken, also if it was free a moment ago.
        """
        ...

    def remove(self, key: str) -> None:
        """Delete a file, or a folder with all that is in it."""
        ...

    def free_bytes(self) -> int | None:
        """How much can be written still; None where there is no limit to know of."""
        ...

    def lock(self, key: str, note: str) -> AbstractContextManager[Check]:
        """Hold `key` until the context ends or the process dies; `note` tells others who holds it.

        Gives a function that checks whether this process still holds the lock. It takes the lock
        again where its file is gone and nobody else holds one in its place.

        Raises:
            ExistsError: somebody else holds it, from `lock` or from the check; the message has
                their note.
        """
        ...

    def holder(self, key: str) -> str | None:
        """Note of whoever holds the lock `key`; None where nobody does, as far as is seen from
        here. Does not take the lock."""
        ...

    def hold(self, key: str) -> AbstractContextManager[bool | None]:
        """Hold a file or folder, whatever it is renamed to, until the context ends or the process
        dies.

        Gives whether it is held: False where somebody else holds it, None where this store cannot
        tell. What is held may still be read, renamed and removed; everybody who removes or replaces
        holds it first, and leaves what others hold.

        Raises:
            NotFoundError: nothing is there.
        """
        ...


class Creating(Protocol):
    """A place that files are created in."""

    def create(self, key: str, nbytes: int) -> AbstractContextManager[Writer]:
        """As `Store.create`."""
        ...


class AmendableStore(Store, Protocol):
    """A store whose files can be changed in place, so that a conversion continues a killed one."""

    def amend(self, key: str) -> AbstractContextManager[Writer]:
        """A file that is there, in its full length, for several processes to write their parts of.
        What this one wrote is durable when the context ends well."""
        ...

    def replace_file(self, source: str, target: str) -> None:
        """Move a file under a name that another file may have, which is gone then, at one instant.
        Durable on return."""
        ...


class PlainReader:
    """A file of a store that has nothing to keep open."""

    def __init__(self, store: ReadStore, key: str) -> None:
        self._store, self._key = store, key

    def read_into(self, start: int, target: memoryview) -> int:
        return self._store.read_into(self._key, start, target)

    def __enter__(self) -> PlainReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass
