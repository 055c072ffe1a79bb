"""Opening the checkpoint at a path while others may replace it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.steady import LOOKS_MAX, UNREADABLE, fingerprint
from holdfast.engine.collector import collector_at_rest
from holdfast.engine.ranks import Ranks, on_rank_0
from holdfast.engine.root import open_for_reading
from holdfast.engine.source import Source
from holdfast.format.manifest import Manifest
from holdfast.storage.store import ReadStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint as it was when it was opened."""

    name: str
    manifest: Manifest
    seen: object
    """Fingerprint of the checkpoint."""

    def is_gone(self, store: ReadStore) -> bool:
        """Whether the checkpoint has been replaced or removed since."""
        return fingerprint(store, self.name) != self.seen


def open_at(path: str | os.PathLike[str]) -> Opened:
    """The checkpoint at `path`, its structure checked. Looks again where another process replaces
    it meanwhile.

    Raises:
        NotFoundError: no checkpoint there.
        DamagedError: files are missing or of another size.
    """
    for left in reversed(range(LOOKS_MAX)):
        store, name = open_for_reading(path)
        seen = fingerprint(store, name)
        try:
            return Opened(name, open_manifest(store, name), seen)
        except UNREADABLE:
            moved = open_for_reading(path)[1] != name
            if not left or not (moved or fingerprint(store, name) != seen):
                raise
    raise AssertionError("the last look returns or raises")


def read_at(path: str | os.PathLike[str], ranks: Ranks, read: Callable[[Source], T]) -> T:
    """What `read` makes of the checkpoint at `path`. Called again on the new one where it fails
    since another process has replaced the checkpoint meanwhile.

    Collective: every rank calls this; `read` raises on every rank alike.
    """
    store, _ = open_for_reading(path)
    for left in reversed(range(LOOKS_MAX)):
        with collector_at_rest():
            opened = on_rank_0(ranks, partial(open_at, path))
        try:
            return read(Source(store, opened.name, opened.manifest))
        except UNREADABLE:
            if not left or not on_rank_0(ranks, partial(opened.is_gone, store)):
                raise
    raise AssertionError("the last look returns or raises")
