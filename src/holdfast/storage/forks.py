"""Make forked children give up the locks, pipes and signal handlers of their parent.

A child made by `os.fork` or `multiprocessing` has a copy of every open file. A lock or a pipe lives
until its last copy is closed. So a data worker that outlives its parent would keep the parent's
locks and pipes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol
from weakref import WeakSet

FORK_WAITS_S = 1.0
"""Longest time that a fork waits for another thread to open a file. Without a limit, a network file
system that hangs would also hang every fork of the process."""


class Leaver(Protocol):
    """An object, such as a lock, of which a forked child must close its own copy."""

    def leave(self) -> None:
        """Close this process's copy, without effect on the parent."""
        ...


# Global, since one hook of `os.register_at_fork` serves all objects: hooks cannot be removed.
_mutex = threading.RLock()
_waited = False
_leavers: WeakSet[Leaver] = WeakSet()
"""Registered objects. References are weak, so that a lock without other references is released."""


@contextmanager
def no_fork_between() -> Iterator[None]:
    """While the context lasts, make forks by other threads wait, for at most `FORK_WAITS_S`. Use it
    to open a file and register it by `leave_in_children`."""
    with _mutex:
        yield


def leave_in_children(leaver: Leaver) -> None:
    """Register `leaver`: every process forked from now on calls its `leave` at once."""
    with _mutex:
        _leavers.add(leaver)


def leavers() -> list[Leaver]:
    """Return every registered object that is still alive."""
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
    # A thread of the parent may hold the old mutex. It does not run in the child, and would never
    # release the mutex there.
    _mutex = threading.RLock()
    for leaver in list(_leavers):
        # The child may have closed all its files already, as daemons do.
        with suppress(OSError, ValueError):
            leaver.leave()
    _leavers.clear()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
