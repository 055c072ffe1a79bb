"""Simulate a power cut after every operation of a protocol.

def save(store: FolderStore) -> None: ...
def load(store: MemoryStore) -> int: ...        the next start; raises on a mix of old and new

results = cut_everywhere(save, load)
assert {outcome for _, outcome in results} == {OLD, NEW}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from benchmarks.power_cuts import Operation, PowerCut, Tree, cuts, fingerprint

from extent import EVERYTHING
from holdfast.errors import HoldfastError
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import Buffer, FileWriter, FolderStore

T = TypeVar("T")

Protocol = Callable[[FolderStore], object]
"""Function that changes a store, and that a power cut may interrupt."""


SEEDS = range(4 if EVERYTHING else 2)
"""Choices of what reaches the disk, per cut and kind of cut."""


class RecordingStore(MemoryStore):
    """A store in memory that records its changes as the file operations of a `LocalStore`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._num_files = 0
        self._files: dict[str, int] = {}
        """Number of each file, by the name under which it was created."""

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[FileWriter]:
        with super().create(key, nbytes) as writer:
            with self._mutex:
                file = self._files[key] = self._num_files = self._num_files + 1
                self.operations.append(Operation("create", key, file))
                if nbytes:
                    self.operations.append(Operation("resize", key, file, offset=nbytes))
            yield _RecordingWriter(self, writer, key, file)
            self.operations.append(Operation("sync_file", key, file))

    @contextmanager
    def join(self, key: str) -> Iterator[FileWriter]:
        with super().join(key) as writer:
            yield _RecordingWriter(self, writer, key, self._files[key])

    def make_folder(self, key: str) -> None:
        with self._mutex:
            super().make_folder(key)
            if key:
                self.operations.append(Operation("make_folder", key))

    def sync(self, folder: str) -> None:
        super().sync(folder)
        self.operations.append(Operation("sync_folder", folder))

    def rename(self, source: str, target: str) -> None:
        with self._mutex:
            super().rename(source, target)
            self.operations.append(Operation("rename", source, target=target))
            for folder in dict.fromkeys(key.rpartition("/")[0] for key in (target, source)):
                self.operations.append(Operation("sync_folder", folder))

    def link(self, source: str, target: str) -> None:
        with self._mutex:
            super().link(source, target)
            self.operations.append(Operation("link", source, target=target))

    def remove(self, key: str) -> None:
        with suppress(HoldfastError):  # It is a file.
            for name in self.list(key):
                self.remove(f"{key}/{name.rstrip('/')}")
        with self._mutex:
            super().remove(key)
            self.operations.append(Operation("unlink", key))


class _RecordingWriter:
    def __init__(self, store: RecordingStore, beneath: FileWriter, key: str, file: int) -> None:
        self._store, self._beneath, self._key, self._file = store, beneath, key, file

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        self._beneath.write(offset, parts)
        if data := b"".join(parts):
            self._store.operations.append(Operation("write", self._key, self._file, offset, data))


def recorded(*protocols: Protocol) -> list[list[Operation]]:
    """Run protocols one after the other on one store, and return the operations of each."""
    store, operations = RecordingStore(), []
    for protocol in protocols:
        before = len(store.operations)
        protocol(store)
        operations.append(store.operations[before:])
    return operations


def cut_everywhere(
    protocol: Protocol,
    load: Callable[[MemoryStore], T],
    *,
    before: Protocol | None = None,
    seeds: Iterable[int] = SEEDS,
) -> list[tuple[PowerCut, T]]:
    """Return the result of `load` after each possible power cut during `protocol`.

    The last result is repeated: that of a completed protocol which lost everything not synced.
    `before` creates the initial, durable state. `load` gets a new store for each distinct state
    that a cut can leave, and may change it; its errors carry a note with the cut.
    """
    first, second = recorded(before or (lambda _: None), protocol)
    outcomes: dict[int, T] = {}
    results = []
    for cut, tree in cuts([*first, *second], durable=len(first), seeds=seeds):
        state = fingerprint(tree)
        if state not in outcomes:
            try:
                outcomes[state] = load(store_of(tree))
            except Exception as error:
                error.add_note(str(cut))
                raise
        results.append((cut, outcomes[state]))
    completed = next(r for r in results if (r[0].at, r[0].version) == (len(second), "lost"))
    return [*results, completed]


def store_of(tree: Tree) -> MemoryStore:
    """Make a store with the files of a tree."""
    store = MemoryStore()
    for path, data in tree.items():
        if data is None:
            store.make_folder(path)
        else:
            with store.create(path, len(data)) as writer:
                writer.write(0, [data])
    return store


def tree_of(store: MemoryStore, folder: str = "") -> Tree:
    """Return all files and folders below a folder of a store."""
    tree: dict[str, bytes | None] = {}
    for name in store.list(folder):
        path = f"{folder}/{name}".strip("/")
        if name.endswith("/"):
            tree |= {path: None, **tree_of(store, path)}
        else:
            tree[path] = store.read(path, 0, store.size(path))
    return tree
