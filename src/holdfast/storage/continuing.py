"""Going on with files that an earlier process has begun: what is there already is not written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from holdfast.storage.store import AmendableStore, Buffer, Writer

WINDOW_BYTES = 4 << 20
"""Compared at a time."""


class Continuing:
    """Creates files in a store that may hold them already, in part and with anything in them: every
    byte to be written is compared with the one in its place, and written where they differ."""

    def __init__(self, store: AmendableStore) -> None:
        self._store = store
        self.kept_bytes = 0
        """Bytes that were there already."""

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[Writer]:
        """As `Store.create`, but a file of this size may be there, with anything in it."""
        folder, _, name = key.rpartition("/")
        if name not in self._store.list(folder):
            with self._store.create(key, nbytes) as writer:
                yield writer
            return
        with self._store.amend(key) as writer:
            yield _Differing(self, self._store, key, writer)


class _Differing:
    """Writes what is not there yet."""

    def __init__(self, files: Continuing, store: AmendableStore, key: str, writer: Writer) -> None:
        self._files, self._store, self._key, self._writer = files, store, key, writer
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
            self._files.kept_bytes += len(wanted)
        else:
            self._writer.write(offset, [wanted])
