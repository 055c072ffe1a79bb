"""Open a checkpoint that another process may replace meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from holdfast.catalog.catalog import folder_of, open_manifest
from holdfast.catalog.open_any import check_folder
from holdfast.catalog.source import Source
from holdfast.catalog.steady import LOOKS_MAX, UNREADABLE, fingerprint
from holdfast.comm import Ranks, run_on_rank_0
from holdfast.format.manifest import Manifest
from holdfast.planning.gc_pause import gc_paused
from holdfast.storage.store import ReadStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Opened:
    """Manifest of a checkpoint, and the fingerprint that the checkpoint had then."""

    name: str
    manifest: Manifest
    fingerprint: object

    def is_gone(self, store: ReadStore) -> bool:
        """Whether the checkpoint has been replaced or deleted since."""
        return fingerprint(store, self.name) != self.fingerprint


def read_in(store: ReadStore, name: str, ranks: Ranks, read: Callable[[Source], T]) -> T:
    """Returns `read(source)` for the checkpoint `name`. If it fails because another process has
    replaced the checkpoint, `read` is called again with the new one.

    Collective: every rank calls this. `read` must fail either on all ranks or on none.
    """
    for tries_left in reversed(range(LOOKS_MAX)):
        with gc_paused():
            opened = run_on_rank_0(ranks, partial(open_in, store, name))
        try:
            return read(Source(store, opened.name, opened.manifest))
        except UNREADABLE:
            if not tries_left or not run_on_rank_0(ranks, partial(opened.is_gone, store)):
                raise
    raise AssertionError("the last try returns or raises")


def open_in(store: ReadStore, name: str) -> Opened:
    """Open the checkpoint `name` of a store and check its structure. Tries again if another process
    replaces the checkpoint meanwhile.

    Raises:
        NotFoundError: there is no such checkpoint.
        DamagedError: files are missing, or have another size than the manifest says.
    """
    for tries_left in reversed(range(LOOKS_MAX)):
        folder = folder_of(store, name)
        before = fingerprint(store, folder)
        try:
            return Opened(folder, open_manifest(store, folder), before)
        except UNREADABLE:
            moved = folder_of(store, name) != folder
            if not tries_left or not (moved or fingerprint(store, folder) != before):
                check_folder(store, folder)
                raise
    raise AssertionError("the last try returns or raises")
