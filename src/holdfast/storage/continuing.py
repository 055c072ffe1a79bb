"""Resume writing files that a killed process left unfinished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from holdfast.storage.store import Buffer, FileReader, FileWriter, FolderStore

WINDOW_BYTES = 4 << 20
"""Bytes that are compared at a time."""


class Continuing:
    """Creates files, or completes files that exist already, whatever their content.

    Compares the new bytes with those that are in the file, `WINDOW_BYTES` at a time. Writes only
    the windows that differ.
    """

    def __init__(self, store: FolderStore) -> None:
        self._store = store
        self.kept_bytes = 0
        """Number of bytes that were in place already and not written again."""

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[FileWriter]:
        """Like `Store.create`, but a file of this size may exist already, with any content."""
        folder, _, name = key.rpartition("/")
        if name not in self._store.list(folder):
            with self._store.create(key, nbytes) as writer:
                yield writer
            return
        with self._store.open(key) as reader, self._store.amend(key) as writer:
            yield _Differing(self, reader, writer)


class _Differing:
    """Writer of only those windows that differ from the file's content."""

    def __init__(self, files: Continuing, reader: FileReader, writer: FileWriter) -> None:
        self._files, self._reader, self._writer = files, reader, writer
        self._buffer = memoryview(bytearray(WINDOW_BYTES))

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), WINDOW_BYTES):
                self._put(offset + start, view[start : start + WINDOW_BYTES])
            offset += len(view)

    def _put(self, offset: int, window: memoryview) -> None:
        stored = self._buffer[: len(window)]
        complete = self._reader.read_into(offset, stored) == len(window)
        if complete and np.array_equal(np.frombuffer(stored, "u1"), np.frombuffer(window, "u1")):
            self._files.kept_bytes += len(window)
        else:
            self._writer.write(offset, [window])
