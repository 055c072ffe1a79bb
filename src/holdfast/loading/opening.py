"""Load a checkpoint that another process may replace during the load."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from holdfast.catalog.open_any import Opened
from holdfast.catalog.steady import retry_if_replaced
from holdfast.comm import Ranks, run_on_rank_0
from holdfast.planning.gc_pause import gc_paused
from holdfast.storage.store import ReadStore

T = TypeVar("T")


def read_on_all(
    ranks: Ranks, store: ReadStore, find: Callable[[], Opened], read: Callable[[Opened], T]
) -> T:
    """Return `read(opened)` for the checkpoint that `find` opens on rank 0. If `read` fails
    because another process has replaced the checkpoint, call both again.

    Collective: every rank calls this. `read` must fail either on all ranks or on none.
    """

    def opened() -> Opened:
        with gc_paused():
            return run_on_rank_0(ranks, find)

    def was_replaced(opened: Opened) -> bool:
        return run_on_rank_0(ranks, lambda: opened.was_replaced(store))

    return retry_if_replaced(opened, read, was_replaced)
