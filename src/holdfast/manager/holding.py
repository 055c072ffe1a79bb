"""The hold of a manager on its folder, its signals and its hooks: from when it is made until it is
closed, in the process that made it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime

from holdfast.catalog.catalog import Catalog
from holdfast.comm import host_name
from holdfast.errors import UsageError
from holdfast.format.names import LOCK
from holdfast.manager.hub import FOLDER, Hub
from holdfast.manager.retention import put_in_order


class Holding:
    """What a manager holds. A context that gives it up at its end, whatever happens in it."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self._pid = os.getpid()
        # Also when the program ends without `close`: later the modules that it needs are gone.
        weakref.finalize(self, _give_up, self._held, self._pid)
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Whether the manager works: false once it is closed, and in a forked child."""
        return not self._closed and self._pid == os.getpid()

    def check_open(self) -> None:
        """Make sure that the manager works.

        Raises:
            UsageError: it was closed, or this process inherited it by a fork.
        """
        if self._pid != os.getpid():
            raise UsageError(
                f"this CheckpointManager belongs to process {self._pid}; this one, {os.getpid()}, "
                "was forked from it",
                hint="use it where it was made; a process that saves on its own makes its own, "
                "with another folder",
            )
        if self._closed:
            raise UsageError(
                "this CheckpointManager is closed: it saves and loads no more",
                hint="make another one; `with CheckpointManager(...)` closes it at the end of the "
                "block",
            )

    def take(self, catalog: Catalog, hub: Hub) -> None:
        """Lock the folder of `catalog` for this process, and clean up what killed runs left there
        and among the exports below it.

        Raises:
            ExistsError: another manager, of this process or another one, holds it.
        """
        store = catalog.store
        store.make_folder("")
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        note = f"host {host_name()}, pid {os.getpid()}, since {since}"
        check_lock = self._held.enter_context(store.lock(LOCK, note))
        catalog.check_lock = check_lock
        put_in_order(store)
        if f"{FOLDER}/" in store.list():
            # Who reads exports does not know of what stands aside.
            put_in_order(hub.catalog.store)
        hub.catalog.check_lock = check_lock

    def callback(self, give_up: Callable[[], object]) -> None:
        """Call `give_up` when the manager is closed."""
        self._held.callback(give_up)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._held.close()


def _give_up(held: ExitStack, pid: int) -> None:
    if pid == os.getpid():
        held.close()
