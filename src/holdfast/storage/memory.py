"""A `Store` in memory, for tests and experiments."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from holdfast.errors import ExistsError, NotFoundError, StorageError
from holdfast.storage.publishing import publish_by_rename, unpublish_by_rename
from holdfast.storage.store import Buffer, Check, FileWriter, Links, PlainReader

_Folder = dict[str, "bytearray | _Folder"]
_Node = bytearray | _Folder


class MemoryStore:
    """A tree of files in memory."""

    def __init__(self, capacity: int | None = None) -> None:
        self._root: _Folder = {}
        self._capacity = capacity
        self._locks: dict[str, str] = {}
        self._held: list[_Node] = []
        self._mutex = threading.RLock()

    @property
    def url(self) -> str:
        return "memory:"

    def _find(self, key: str) -> _Node:
        node: _Node = self._root
        for part in filter(None, key.split("/")):
            if not isinstance(node, dict) or part not in node:
                raise NotFoundError(f"nothing at `{self.url}{key}`")
            node = node[part]
        return node

    def _folder(self, key: str) -> _Folder:
        node = self._find(key)
        if not isinstance(node, dict):
            raise StorageError(f"`{self.url}{key}` is a file, not a folder")
        return node

    def _file(self, key: str) -> bytearray:
        node = self._find(key)
        if not isinstance(node, bytearray):
            raise StorageError(f"`{self.url}{key}` is a folder, not a file")
        return node

    def list(self, folder: str = "") -> Sequence[str]:
        with self._mutex:
            entries = self._folder(folder).items()
            return sorted(name + "/" * isinstance(node, dict) for name, node in entries)

    def size(self, key: str) -> int:
        with self._mutex:
            return len(self._file(key))

    def read(self, key: str, start: int, stop: int) -> bytes:
        with self._mutex:
            return bytes(self._file(key)[start:stop])

    def open(self, key: str) -> PlainReader:
        return PlainReader(self, key)

    def leads_out(self, folder: str, file: str) -> bool:  # noqa: ARG002 - there are no links
        return False

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[FileWriter]:
        with self._mutex:
            free = self.free_bytes()
            if free is not None and nbytes > free:
                raise StorageError(f"cannot write `{key}`: need {nbytes} bytes, {free} are free")
            folder, name = _split(key)
            entries = self._folder(folder)
            if name in entries:
                raise StorageError(f"`{self.url}{key}` exists already")
            entries[name] = file = bytearray(nbytes)
        yield _MemoryWriter(file)

    def join(self, key: str) -> AbstractContextManager[FileWriter]:
        return self.amend(key)

    def make_folder(self, key: str) -> None:
        with self._mutex:
            folder, name = _split(key)
            if name:
                entries = self._folder(folder)
                if name in entries:
                    raise StorageError(f"`{self.url}{key}` exists already")
                entries[name] = {}

    def sync(self, folder: str) -> None:
        with self._mutex:
            self._folder(folder)

    def rename(self, source: str, target: str) -> None:
        with self._mutex:
            source_folder, source_name = _split(source)
            target_folder, target_name = _split(target)
            new_entries = self._folder(target_folder)
            if target_name in new_entries:
                raise ExistsError(f"`{self.url}{target}` exists already")
            new_entries[target_name] = self._find(source)
            del self._folder(source_folder)[source_name]

    def publish(self, folder: str, name: str, *, replace: bool = False) -> None:
        publish_by_rename(self, folder, name, replace=replace)

    def unpublish(self, name: str, removing: str) -> str:
        return unpublish_by_rename(self, name, removing)

    def remove(self, key: str) -> None:
        with self._mutex:
            self._find(key)
            folder, name = _split(key)
            del self._folder(folder)[name]

    def link(self, source: str, target: str) -> None:
        with self._mutex:
            file = self._file(source)
            folder, name = _split(target)
            entries = self._folder(folder)
            if name in entries:
                raise StorageError(f"`{self.url}{target}` exists already")
            entries[name] = file

    def links(self, key: str) -> Links:
        with self._mutex:
            file = self._file(key)
            return Links(str(id(file)), sum(other is file for other in _files(self._root)))

    def evict(self, key: str) -> None:
        """Do nothing, since files in memory have no cache."""

    def free_bytes(self) -> int | None:
        if self._capacity is None:
            return None
        with self._mutex:
            return self._capacity - _nbytes(self._root)

    @contextmanager
    def lock(self, key: str, note: str) -> Iterator[Check]:
        with self._mutex:
            if key in self._locks:
                raise ExistsError(f"`{self.url}` is in use by another run: {self._locks[key]}")
            self._locks[key] = note
        try:
            yield lambda: None
        finally:
            with self._mutex:
                del self._locks[key]

    def holder(self, key: str) -> str | None:
        with self._mutex:
            return self._locks.get(key)

    @contextmanager
    def hold(self, key: str) -> Iterator[bool | None]:
        with self._mutex:
            node = self._find(key)
            is_free = all(held is not node for held in self._held)
            if is_free:
                self._held.append(node)
        try:
            yield is_free
        finally:
            if is_free:
                with self._mutex:
                    self._held = [held for held in self._held if held is not node]

    @contextmanager
    def amend(self, key: str) -> Iterator[FileWriter]:
        with self._mutex:
            file = self._file(key)
        yield _MemoryWriter(file)

    def replace_file(self, source: str, target: str) -> None:
        with self._mutex:
            folder, name = _split(target)
            self._folder(folder)[name] = self._file(source)
            self.remove(source)


class _MemoryWriter:
    def __init__(self, file: bytearray) -> None:
        self._file = file

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        for part in parts:
            self._file[offset : offset + len(part)] = part
            offset += len(part)


def _split(key: str) -> tuple[str, str]:
    folder, _, name = key.rpartition("/")
    return folder, name


def _files(node: _Node) -> Iterator[bytearray]:
    """Yield the files in a folder, at any depth: each file once for each of its names."""
    if isinstance(node, dict):
        for child in node.values():
            yield from _files(child)
    else:
        yield node


def _nbytes(node: _Node) -> int:
    return sum(map(len, {id(file): file for file in _files(node)}.values()))
