"""Opening the checkpoint at a path while others may replace it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from holdfast.catalog.catalog import open_manifest, standing
from holdfast.catalog.open_any import check_folder
from holdfast.catalog.paths import place_of
from holdfast.catalog.source import Source
from holdfast.catalog.steady import LOOKS_MAX, UNREADABLE, fingerprint
from holdfast.comm import Ranks, run_on_rank_0
from holdfast.format.manifest import Manifest
from holdfast.planning.gc_pause import gc_paused
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


def open_at(path: str | os.PathLike[str]) -> tuple[ReadStore, Opened]:
    """The checkpoint at `path`, with its store: see `open_in`."""
    store, name = place_of(path)
    return store, open_in(store, name)


def open_in(store: ReadStore, name: str) -> Opened:
    """The checkpoint `name` of a store, its structure checked. Looks again where another process
    replaces it meanwhile.

    Raises:
        NotFoundError: no checkpoint there.
        DamagedError: files are missing or of another size.
    """
    for left in reversed(range(LOOKS_MAX)):
        folder = standing(store, name)
        seen = fingerprint(store, folder)
        try:
            return Opened(folder, open_manifest(store, folder), seen)
        except UNREADABLE:
            moved = standing(store, name) != folder
            if not left or not (moved or fingerprint(store, folder) != seen):
                check_folder(store, folder)
                raise
    raise AssertionError("the last look returns or raises")


def read_at(path: str | os.PathLike[str], ranks: Ranks, read: Callable[[Source], T]) -> T:
    """What `read` makes of the checkpoint at `path`: see `read_in`."""
    return read_in(*place_of(path), ranks, read)


def read_in(store: ReadStore, name: str, ranks: Ranks, read: Callable[[Source], T]) -> T:
    """What `read` makes of the checkpoint `name`. Called again on the new one where it fails since
    another process has replaced the checkpoint meanwhile.

    Collective: every rank calls this; `read` raises on every rank alike.
    """
    for left in reversed(range(LOOKS_MAX)):
        with gc_paused():
            opened = run_on_rank_0(ranks, partial(open_in, store, name))
        try:
            return read(Source(store, opened.name, opened.manifest))
        except UNREADABLE:
            if not left or not run_on_rank_0(ranks, partial(opened.is_gone, store)):
                raise
    raise AssertionError("the last look returns or raises")
