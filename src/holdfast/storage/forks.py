"""Things that a forked child must give up: locks, pipes and signal handlers of its parent.

A child that `os.fork` or `multiprocessing` makes gets a copy of every open file. A lock or a pipe
lives until its last copy is closed, so a data worker that outlives its parent would keep both.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol
from weakref import WeakSet

FORK_WAITS_S = 1.0
"""Longest time for which a fork waits for another thread that opens a file: a network file system
that hangs must not hang the forks of the process too."""


class Leaver(Protocol):
    """An object of which a forked child gives up its copy."""

    def leave(self) -> None:
        """Close this process's copy and touch nothing that the parent still uses."""
        ...


# Module state, since `os.register_at_fork` cannot take a hook back: one hook serves all objects.
_mutex = threading.RLock()
_waited = False
_leavers: WeakSet[Leaver] = WeakSet()
"""Weak, so that a lock which nobody refers to is still released."""


@contextmanager
def no_fork_between() -> Iterator[None]:
    """Keep other threads from forking from before a file is opened until it is registered."""
    with _mutex:
        yield


def leave_in_children(leaver: Leaver) -> None:
    """Call `leaver.leave` in every process that this one forks from now on."""
    with _mutex:
        _leavers.add(leaver)


def leavers() -> list[Leaver]:
    """Every registered object that is still alive."""
    with _mutex:
        return list(_leavers)


def _before() -> None:
    global _waited
    _waited = _mutex.acquire(timeout=FORK_WAITS_S)


def _in_parent() -> None:
    if _waited:
        _mutex.release()


def _in_child() -> None:
    global _mutex
    # A thread that is not in the child may own the parent's.
    _mutex = threading.RLock()
    for leaver in list(_leavers):
        # A child may have closed all its files already, as daemons do.
        with suppress(OSError, ValueError):
            leaver.leave()
    _leavers.clear()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
