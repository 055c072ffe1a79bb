"""A view of a store that lists each folder once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager

from holdfast.format.manifest import LastTensors
from holdfast.storage.store import FileReader, LinkListing, ReadStore

_LOOKED_UP_MIN = 32
"""Number of names in a folder from which looking up a name is faster in a set than in a tuple."""


class ListedStore:
    """A `ReadStore` that remembers the names in each folder.

    Without it, a command that reads thousands of checkpoints would list the folder around them
    several times per checkpoint, and decode equal tensors each time. Another process may have
    changed a folder after it was listed, so check the store itself before you report that something
    is missing or damaged.
    """

    def __init__(self, store: ReadStore) -> None:
        self.store = store
        self._listed: dict[str, Sequence[str]] = {}
        self._link_listing = store if isinstance(store, LinkListing) else None
        self._links: dict[str, Collection[str]] = {}
        """Names of the symbolic links in each folder, if the store lists links."""

        self.last: LastTensors = LastTensors()
        """Cache of the tensors of the manifest that was read last."""

    @property
    def url(self) -> str:
        return self.store.url

    def list(self, folder: str = "") -> Sequence[str]:
        names = self._listed.get(folder)
        if names is None:
            if self._link_listing is None:
                names = self.store.list(folder)
            else:
                names, self._links[folder] = self._link_listing.list_with_links(folder)
            if len(names) >= _LOOKED_UP_MIN:
                names = _Names(names)
            self._listed[folder] = names
        return names

    def size(self, key: str) -> int:
        return self.store.size(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        return self.store.read(key, start, stop)

    def open(self, key: str) -> AbstractContextManager[FileReader]:
        return self.store.open(key)

    def leads_out(self, folder: str, file: str) -> bool:
        if folder in self._links and file in self._listed[folder]:
            # A file that is not a link cannot lead out of its folder.
            return file in self._links[folder] and self.store.leads_out(folder, file)
        return self.store.leads_out(folder, file)


class _Names(tuple[str, ...]):
    """Names in a folder, and a set of them for lookups: readers look up thousands of names."""

    def __init__(self, _: Sequence[str]) -> None:
        self._set = frozenset(self)

    def __contains__(self, name: object) -> bool:
        return name in self._set
