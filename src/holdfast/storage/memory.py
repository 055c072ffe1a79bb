"""A `Store` in memory: for tests, and for trying things out."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from holdfast.errors import ExistsError, NotFoundError, StorageError
from holdfast.storage.store import Buffer, Check, PlainReader


@dataclass(slots=True)
class _File:
    data: bytearray


@dataclass(slots=True)
class _Folder:
    entries: dict[str, _File | _Folder] = field(default_factory=dict)


class MemoryStore:
    """A tree of files in memory."""

    def __init__(self, capacity: int | None = None) -> None:
        self._root = _Folder()
        self._capacity = capacity
        self._locks: dict[str, str] = {}
        self._held: list[_File | _Folder] = []
        self._mutex = threading.RLock()

    @property
    def url(self) -> str:
        return "memory:"

    def _find(self, key: str) -> _File | _Folder:
        node: _File | _Folder = self._root
        for part in filter(None, key.split("/")):
            if not isinstance(node, _Folder) or part not in node.entries:
                raise NotFoundError(f"nothing at `{self.url}{key}`")
            node = node.entries[part]
        return node

    def _folder(self, key: str) -> _Folder:
        node = self._find(key)
        if not isinstance(node, _Folder):
            raise StorageError(f"`{self.url}{key}` is a file, not a folder")
        return node

    def _file(self, key: str) -> _File:
        node = self._find(key)
        if not isinstance(node, _File):
            raise StorageError(f"`{self.url}{key}` is a folder, not a file")
        return node

    def list(self, folder: str = "") -> Sequence[str]:
        with self._mutex:
            entries = self._folder(folder).entries.items()
            return sorted(name + "/" * isinstance(node, _Folder) for name, node in entries)

    def size(self, key: str) -> int:
        with self._mutex:
            return len(self._file(key).data)

    def read(self, key: str, start: int, stop: int) -> bytes:
        with self._mutex:
            return bytes(self._file(key).data[start:stop])

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        data = self.read(key, start, start + len(target))
        target[: len(data)] = data
        return len(data)

    def open(self, key: str) -> PlainReader:
        return PlainReader(self, key)

    def leads_out(self, folder: str, file: str) -> bool:  # noqa: ARG002 - there are no links
        return False

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[_MemoryWriter]:
        with self._mutex:
            free = self.free_bytes()
            if free is not None and nbytes > free:
                raise StorageError(f"cannot write `{key}`: need {nbytes} bytes, {free} are free")
            folder, name = _split(key)
            entries = self._folder(folder).entries
            if name in entries:
                raise StorageError(f"`{self.url}{key}` exists already")
            entries[name] = file = _File(bytearray(nbytes))
        yield _MemoryWriter(file)

    def make_folder(self, key: str) -> None:
        with self._mutex:
            folder, name = _split(key)
            if name:
                entries = self._folder(folder).entries
                if name in entries:
                    raise StorageError(f"`{self.url}{key}` exists already")
                entries[name] = _Folder()

    def sync(self, folder: str) -> None:
        with self._mutex:
            self._folder(folder)

    def rename(self, source: str, target: str) -> None:
        with self._mutex:
            (source_folder, source_name), (target_folder, name) = _split(source), _split(target)
            above, below = self._folder(source_folder), self._folder(target_folder)
            if name in below.entries:
                raise ExistsError(f"`{self.url}{target}` exists already")
            below.entries[name] = self._find(source)
            del above.entries[source_name]

    def remove(self, key: str) -> None:
        with self._mutex:
            self._find(key)
            folder, name = _split(key)
            del self._folder(folder).entries[name]

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
            mine = not any(one is node for one in self._held)
            if mine:
                self._held.append(node)
        try:
            yield mine
        finally:
            if mine:
                with self._mutex:
                    self._held = [one for one in self._held if one is not node]

    @contextmanager
    def amend(self, key: str) -> Iterator[_MemoryWriter]:
        with self._mutex:
            file = self._file(key)
        yield _MemoryWriter(file)

    def replace_file(self, source: str, target: str) -> None:
        with self._mutex:
            file = self._file(source)
            for key in (source, target):
                folder, name = _split(key)
                self._folder(folder).entries.pop(name, None)
            folder, name = _split(target)
            self._folder(folder).entries[name] = file


class _MemoryWriter:
    def __init__(self, file: _File) -> None:
        self._file = file

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        for part in parts:
            self._file.data[offset : offset + len(part)] = part
            offset += len(part)


def _split(key: str) -> tuple[str, str]:
    folder, _, name = key.rpartition("/")
    return folder, name


def _nbytes(folder: _Folder) -> int:
    nodes = folder.entries.values()
    return sum(_nbytes(n) if isinstance(n, _Folder) else len(n.data) for n in nodes)
