"""Crash points, enumerated: a protocol is run once, the power then goes at each of its operations.

def save(store: Store) -> None: ...
def look(store: MemoryStore) -> int: ...        what the next start finds; raises on a mix

found = cut_everywhere(save, look)
assert {outcome for _, outcome in found} == {OLD, NEW}
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from holdfast.errors import HoldfastError
from holdfast.format.checksum import checksum
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import Buffer, Check, PlainReader, Store, Writer
from holdfast.testing.disk import Operation, PowerCut, Tree, cuts

T = TypeVar("T")

Protocol = Callable[[Store], object]
"""Something that is done to a store, and that a power cut may end."""


class RecordingStore:
    """A store in memory that keeps every operation which changes it, as `LocalStore` would do them
    on a file system."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._beneath = MemoryStore()
        self._mutex = threading.Lock()
        self._num_files = 0

    @property
    def url(self) -> str:
        return self._beneath.url

    def list(self, folder: str = "") -> Sequence[str]:
        return self._beneath.list(folder)

    def size(self, key: str) -> int:
        return self._beneath.size(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        return self._beneath.read(key, start, stop)

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        return self._beneath.read_into(key, start, target)

    def open(self, key: str) -> PlainReader:
        return PlainReader(self, key)

    def leads_out(self, folder: str, file: str) -> bool:
        return self._beneath.leads_out(folder, file)

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[Writer]:
        with self._beneath.create(key, nbytes) as writer:
            with self._mutex:
                file = self._num_files = self._num_files + 1
                self.operations.append(Operation("create", key, file))
                if nbytes:
                    self.operations.append(Operation("resize", key, file, offset=nbytes))
            yield _RecordingWriter(self, writer, key, file)
            self._done(Operation("sync_file", key, file))

    def make_folder(self, key: str) -> None:
        with self._mutex:
            self._beneath.make_folder(key)
            if key:
                self.operations.append(Operation("make_folder", key))

    def sync(self, folder: str) -> None:
        self._beneath.sync(folder)
        self._done(Operation("sync_folder", folder))

    def rename(self, source: str, target: str) -> None:
        above, other = target.rpartition("/")[0], source.rpartition("/")[0]
        with self._mutex:
            self._beneath.rename(source, target)
            self.operations.append(Operation("rename", source, target=target))
            for folder in dict.fromkeys((above, other)):
                self.operations.append(Operation("sync_folder", folder))

    def remove(self, key: str) -> None:
        for below in _below(self._beneath, key):
            self.remove(f"{key}/{below.rstrip('/')}")
        with self._mutex:
            self._beneath.remove(key)
            self.operations.append(Operation("unlink", key))

    def free_bytes(self) -> int | None:
        return self._beneath.free_bytes()

    @contextmanager
    def lock(self, key: str, note: str) -> Iterator[Check]:
        with self._beneath.lock(key, note) as check:
            yield check

    def holder(self, key: str) -> str | None:
        return self._beneath.holder(key)

    def hold(self, key: str) -> AbstractContextManager[bool | None]:
        # No change to the disk: whoever looks after a power cut finds nothing held.
        return self._beneath.hold(key)

    def _done(self, operation: Operation) -> None:
        with self._mutex:
            self.operations.append(operation)


class _RecordingWriter:
    def __init__(self, store: RecordingStore, beneath: Writer, key: str, file: int) -> None:
        self._store, self._beneath, self._key, self._file = store, beneath, key, file

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        self._beneath.write(offset, parts)
        data = b"".join(parts)
        if data:
            self._store._done(Operation("write", self._key, self._file, offset, data))


def _below(store: Store, key: str) -> Sequence[str]:
    try:
        return store.list(key)
    except HoldfastError:
        return ()


def recorded(*protocols: Protocol) -> list[list[Operation]]:
    """What each protocol does, one after the other on one store."""
    store, done = RecordingStore(), []
    for protocol in protocols:
        before = len(store.operations)
        protocol(store)
        done.append(store.operations[before:])
    return done


def cut_everywhere(
    protocol: Protocol,
    look: Callable[[MemoryStore], T],
    *,
    before: Protocol | None = None,
    seeds: Iterable[int] = range(4),
) -> list[tuple[PowerCut, T]]:
    """What the next start finds after each cut of `protocol`; the last is that of a protocol that
    came to its end, and then lost all that it had not synced.

    `before` makes what was there, and is durable. `look` is given a store of its own for each state
    that a cut can leave, and may change it; what it raises comes out with the cut that led to it.
    States that are equal are looked at once.
    """
    first, second = recorded(before or (lambda _: None), protocol)
    seen: dict[int, T] = {}
    found = []
    for cut, tree in cuts([*first, *second], durable=len(first), seeds=seeds):
        state = fingerprint(tree)
        if state not in seen:
            try:
                seen[state] = look(store_of(tree))
            except Exception as error:
                error.add_note(str(cut))
                raise
        found.append((cut, seen[state]))
    ended = next(e for e in found if (e[0].at, e[0].version) == (len(second), "lost"))
    return [*found, ended]


def store_of(tree: Tree) -> MemoryStore:
    """A store that holds what a cut has left."""
    store = MemoryStore()
    for path, data in tree.items():
        if data is None:
            store.make_folder(path)
        else:
            with store.create(path, len(data)) as writer:
                writer.write(0, [data])
    return store


def fingerprint(tree: Tree) -> int:
    """Equal for equal trees; ids of attempts count, so that runs of their own differ."""
    lines = (
        f"{path}\0{'folder' if data is None else f'{len(data)} {checksum(data):x}'}"
        for path, data in sorted(tree.items())
    )
    return checksum("\n".join(lines).encode(errors="surrogateescape"))
