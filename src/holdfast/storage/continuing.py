"""Going on with files that an earlier process has begun: what is there already is not written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from holdfast.storage.local import LocalStore
from holdfast.storage.store import Buffer, Writer

WINDOW_BYTES = 4 << 20
"""Compared at a time."""


class ContinuingStore(LocalStore):
    """A folder whose files may be there in part, of which nothing need be known: every byte that is
    to be written is compared with what stands in its place, and written where they differ."""

    kept_bytes = 0
    """Which were there already."""

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[Writer]:
        """As of any store, but that a file of this size may be there, with anything in it."""
        folder, _, name = key.rpartition("/")
        if name not in self.list(folder):
            with super().create(key, nbytes) as writer:
                yield writer
            return
        with self.amend(key) as writer:
            yield _Differing(self, key, writer)


class _Differing:
    """Writes what is not there yet."""

    def __init__(self, store: ContinuingStore, key: str, writer: Writer) -> None:
        self._store, self._key, self._writer = store, key, writer
        self._found = memoryview(bytearray(WINDOW_BYTES))

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), WINDOW_BYTES):
                self._put(offset + start, view[start : start + WINDOW_BYTES])
            offset += len(view)

    def _put(self, offset: int, wanted: memoryview) -> None:
        found = self._found[: len(wanted)]
        whole = self._store.read_into(self._key, offset, found) == len(wanted)
        if whole and np.array_equal(np.frombuffer(found, "u1"), np.frombuffer(wanted, "u1")):
            self._store.kept_bytes += len(wanted)
        else:
            self._writer.write(offset, [wanted])
