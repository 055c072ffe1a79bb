"""A store whose operations fail on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from holdfast.storage.publishing import publish_by_rename, unpublish_by_rename
from holdfast.storage.store import (
    Buffer,
    Check,
    FileWriter,
    FolderStore,
    Joining,
    Linking,
    Links,
    PlainReader,
)

Fail = Callable[[str, str], None]
"""Function `fail(verb, key)`, called before an operation. It raises an error to make it fail."""


class LinkingStore(FolderStore, Linking, Joining, Protocol):
    """A store with all operations, including hard links and joint writing of a file."""


class FailingStore:
    """A wrapper of a store that calls `fail` before each operation except `evict`.

    The verbs are `list`, `size`, `read`, `make_folder`, `create`, `amend`, `join`, `write`, `end`
    (before the content of a file becomes durable, or a joined file is closed), `sync`, `rename`,
    `link`, `remove`, `free_bytes`, `lock`, `holder` and `hold`. `publish` and `unpublish` consist
    of renames and deletions.
    """

    def __init__(self, beneath: LinkingStore, fail: Fail) -> None:
        self._beneath, self._fail = beneath, fail

    @property
    def url(self) -> str:
        return self._beneath.url

    def list(self, folder: str = "") -> Sequence[str]:
        self._fail("list", folder)
        return self._beneath.list(folder)

    def size(self, key: str) -> int:
        self._fail("size", key)
        return self._beneath.size(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        self._fail("read", key)
        return self._beneath.read(key, start, stop)

    def open(self, key: str) -> PlainReader:
        return PlainReader(self, key)

    def leads_out(self, folder: str, file: str) -> bool:
        self._fail("read", f"{folder}/{file}")
        return self._beneath.leads_out(folder, file)

    def create(self, key: str, nbytes: int) -> AbstractContextManager[FileWriter]:
        self._fail("create", key)
        return self._failing(key, self._beneath.create(key, nbytes))

    def amend(self, key: str) -> AbstractContextManager[FileWriter]:
        self._fail("amend", key)
        return self._failing(key, self._beneath.amend(key))

    def join(self, key: str) -> AbstractContextManager[FileWriter]:
        self._fail("join", key)
        return self._failing(key, self._beneath.join(key))

    @contextmanager
    def _failing(
        self, key: str, opened: AbstractContextManager[FileWriter]
    ) -> Iterator[FileWriter]:
        with opened as writer:
            yield _FailingWriter(writer, key, self._fail)
            self._fail("end", key)

    def replace_file(self, source: str, target: str) -> None:
        self._fail("rename", source)
        self._beneath.replace_file(source, target)

    def make_folder(self, key: str) -> None:
        self._fail("make_folder", key)
        self._beneath.make_folder(key)

    def sync(self, folder: str) -> None:
        self._fail("sync", folder)
        self._beneath.sync(folder)

    def rename(self, source: str, target: str) -> None:
        self._fail("rename", source)
        self._beneath.rename(source, target)

    def link(self, source: str, target: str) -> None:
        self._fail("link", target)
        self._beneath.link(source, target)

    def links(self, key: str) -> Links:
        self._fail("size", key)
        return self._beneath.links(key)

    def evict(self, key: str) -> None:
        self._beneath.evict(key)

    def publish(self, folder: str, name: str, *, replace: bool = False) -> None:
        publish_by_rename(self, folder, name, replace=replace)

    def unpublish(self, name: str, removing: str) -> str:
        return unpublish_by_rename(self, name, removing)

    def remove(self, key: str) -> None:
        self._fail("remove", key)
        self._beneath.remove(key)

    def free_bytes(self) -> int | None:
        self._fail("free_bytes", "")
        return self._beneath.free_bytes()

    def lock(self, key: str, note: str) -> AbstractContextManager[Check]:
        self._fail("lock", key)
        return self._beneath.lock(key, note)

    def holder(self, key: str) -> str | None:
        self._fail("holder", key)
        return self._beneath.holder(key)

    def hold(self, key: str) -> AbstractContextManager[bool | None]:
        self._fail("hold", key)
        return self._beneath.hold(key)


class _FailingWriter:
    def __init__(self, beneath: FileWriter, key: str, fail: Fail) -> None:
        self._beneath, self._key, self._fail = beneath, key, fail

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        self._fail("write", self._key)
        self._beneath.write(offset, parts)
