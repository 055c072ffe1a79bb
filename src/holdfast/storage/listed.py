"""A view of a store that lists each folder once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from holdfast.format.manifest import LastTensors
from holdfast.storage.store import FileReader, ReadStore


class ListedStore:
    """A `ReadStore` that remembers the names in each folder.

    A command that looks at thousands of checkpoints would otherwise list the folder around them
    several times for each, and decode equal tensors for each. Another process may have changed the
    folder since: look again, at the store itself, before you report that something is missing or
    damaged.
    """

    def __init__(self, store: ReadStore) -> None:
        self.store = store
        self._listed: dict[str, Sequence[str]] = {}
        self.last: LastTensors = LastTensors()
        """Tensors of the manifest that was read last."""

    @property
    def url(self) -> str:
        return self.store.url

    def list(self, folder: str = "") -> Sequence[str]:
        if folder not in self._listed:
            self._listed[folder] = _Names(self.store.list(folder))
        return self._listed[folder]

    def size(self, key: str) -> int:
        return self.store.size(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        return self.store.read(key, start, stop)

    def open(self, key: str) -> AbstractContextManager[FileReader]:
        return self.store.open(key)

    def leads_out(self, folder: str, file: str) -> bool:
        return self.store.leads_out(folder, file)


class _Names(tuple[str, ...]):
    """Names in a folder. Looks one up in constant time, since each of thousands is looked up."""

    def __init__(self, _: Sequence[str]) -> None:
        self._set = frozenset(self)

    def __contains__(self, name: object) -> bool:
        return name in self._set
