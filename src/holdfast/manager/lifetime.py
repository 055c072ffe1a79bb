"""Lock, signals and hooks that a manager holds until it is closed, in the process that made it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from weakref import WeakSet

from torch.optim import Optimizer

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import put_in_order
from holdfast.comm import host_name
from holdfast.errors import UsageError
from holdfast.format.names import LOCK
from holdfast.manager.hf import FOLDER, HFFormat
from holdfast.storage.opening import is_url


class Lifetime:
    """Context that closes a `CheckpointManager` when it ends, also after an error: it releases
    everything that the manager holds."""

    def __init__(self) -> None:
        self.held: ExitStack = ExitStack()
        """Contexts that end, and functions that are called, when the manager is closed."""

        self._pid = os.getpid()
        # If the program ends without `close`, release everything before Python unloads modules.
        weakref.finalize(self, _release, self.held, self._pid)
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Whether the manager can be used: False once it is closed, and in a forked child."""
        return not self._closed and self._pid == os.getpid()

    def check_open(self) -> None:
        """Raise a UsageError if the manager is closed, or if this process is a forked child."""
        if self._pid != os.getpid():
            raise UsageError(
                f"this CheckpointManager belongs to process {self._pid}; this one, {os.getpid()}, "
                "was forked from it",
                hint="use it in that process, or make another one here, with another folder",
            )
        if self._closed:
            raise UsageError(
                "this CheckpointManager is closed: it neither saves nor loads",
                hint="make another one; `with CheckpointManager(...)` closes it at the end of the "
                "block",
            )

    def take(self, catalog: Catalog, hf: HFFormat) -> None:
        """Lock the folder of `catalog` for this process, then clean up after killed runs in that
        folder and in the folder of exports below it.

        Raises:
            ExistsError: another run or manager has locked the folder.
        """
        store = catalog.store
        store.make_folder("")
        catalog.check_lock = self.held.enter_context(store.lock(LOCK, note_of_process()))
        put_in_order(store)
        if f"{FOLDER}/" in store.list() and not is_url(store.url):
            # A killed replacement leaves an export as `.replaced-...`, where other programs do not
            # look for it. Give it its name back.
            put_in_order(hf.catalog.store)

    def callback(self, release: Callable[[], object]) -> None:
        """Call `release` when the manager is closed."""
        self.held.callback(release)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self.held.close()


def note_of_process() -> str:
    """Return the note for a lock file: host and PID of this process, and the current time."""
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"host {host_name()}, pid {os.getpid()}, since {since}"


class OptimizerHooks:
    """Hooks that make optimizers call `wait` before each step, until `lifetime` ends."""

    def __init__(self, lifetime: Lifetime, wait: Callable[[], None]) -> None:
        self._lifetime, self._wait = lifetime, wait
        self._hooked: WeakSet[Optimizer] = WeakSet()

    def add(self, optimizer: Optimizer) -> None:
        """Add the hook to an optimizer, unless the optimizer already has the hook."""
        if optimizer not in self._hooked:
            self._hooked.add(optimizer)
            hook = optimizer.register_step_pre_hook(lambda *_: self._wait())
            self._lifetime.callback(hook.remove)


def _release(held: ExitStack, pid: int) -> None:
    if pid == os.getpid():
        held.close()
