"""Run two actors on one store in every order of their operations, up to a number of switches.

    def save(store: FolderStore) -> Saved: ...
    def start(store: FolderStore) -> None: ...

    for ran in interleavings(before, save, start, switches_max=2):
        assert ...ran.outcomes..., ran

`orders` does the same on a store of another kind.

Each actor is a thread that waits for its turn before each operation, so that operations happen one
at a time in a chosen order. There are too many orders to try all, but few switches between the
actors are enough to break most wrong protocols: M. Musuvathi, S. Qadeer, Iterative context bounding
for systematic testing of multithreaded programs, PLDI 2007.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from crashes import store_of, tree_of
from extent import every
from holdfast.errors import HoldfastError
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import FolderStore
from holdfast.testing.failing import FailingStore

Actor = Callable[[Any], Any]
"""Function that works on a store at the same time as another one."""

S = TypeVar("S")

Wait = Callable[[str, str], None]
"""`wait(verb, key)` returns when the actor may begin its next operation."""

STUCK_S = 60.0
"""Longest wait for a turn; an actor that waits longer is in a deadlock with the other."""


@dataclass(frozen=True, slots=True)
class Ran(Generic[S]):
    """Result of one order."""

    store: S
    outcomes: tuple[Any, Any]
    """Result of each actor, or the HoldfastError that it raised."""

    trace: tuple[str, ...]
    """Operations in order, each with its actor: 0 or 1."""

    def __str__(self) -> str:
        return f"{self.outcomes}:\n  " + "\n  ".join(self.trace)


def interleavings(
    before: Callable[[FolderStore], object], one: Actor, other: Actor, *, switches_max: int
) -> Iterator[Ran[MemoryStore]]:
    """Run two actors in every order with at most `switches_max` switches before one of them ends.

    By default, the last switch is made at every third place, another third after each other first
    turn. `--all` makes it everywhere.

    `before` makes the initial content of each store.
    """
    first = MemoryStore()
    before(first)
    tree = tree_of(first)
    yield from orders(lambda: store_of(tree), FailingStore, one, other, switches_max=switches_max)


def orders(
    new: Callable[[], S],
    view: Callable[[S, Wait], object],
    one: Actor,
    other: Actor,
    *,
    switches_max: int,
) -> Iterator[Ran[S]]:
    """Like `interleavings`, on what `new` makes. `view` gives each actor its own store there."""
    waiting: list[tuple[int, list[int]]] = [(0, []), (1, [])]
    with ThreadPoolExecutor(2, thread_name_prefix="actor") as pool:
        while waiting:
            begins, lengths = waiting.pop()
            turns, store = _Turns(begins, lengths), new()
            futures = [
                pool.submit(partial(_act, actor, partial(view, store), turns, number))
                for number, actor in enumerate((one, other))
            ]
            outcomes = futures[0].result(), futures[1].result()
            yield Ran(store, outcomes, tuple(turns.trace))
            if len(lengths) < switches_max:
                longer: Sequence[int] = range(1, turns.last_length)
                if len(lengths) == switches_max - 1 > 0:
                    longer = every(3, longer, start=lengths[-1])
                waiting += [(begins, [*lengths, length]) for length in longer]


def _act(actor: Actor, view: Callable[[Wait], object], turns: _Turns, number: int) -> Any:
    try:
        return actor(view(partial(turns.wait, number)))
    except HoldfastError as error:
        return error
    except BaseException as error:
        error.add_note("\n  ".join(turns.trace))
        raise
    finally:
        turns.end(number)


class _Turns:
    """Lets the operations of two threads begin in a given order."""

    def __init__(self, begins: int, lengths: list[int]) -> None:
        """Actor `begins` (0 or 1) has the first turn. `lengths` are the operations before each
        switch; after the last one, each actor runs to its end."""
        self.trace: list[str] = []
        self.last_length = 0
        """Number of operations after the last switch, each of which is a place for one more switch.
        0 if the other actor had ended by then, since no switch is possible."""

        self._turn = begins
        self._lengths = list(lengths)
        self._done = 0
        """Operations since the last switch."""

        self._ended = [False, False]
        self._changed = threading.Condition()

    def wait(self, number: int, verb: str, key: str) -> None:
        """Wait until actor `number` may begin its next operation.

        Its previous operation has ended by then; only then may the turn switch.
        """
        with self._changed:
            if self._turn == number and self._lengths and self._done == self._lengths[0]:
                del self._lengths[0]
                self._switch()
            if not self._changed.wait_for(lambda: self._turn == number, STUCK_S):
                raise AssertionError(f"actor {number} never gets its turn")
            self._done += 1
            self.trace.append(f"{number}: {verb} {key}")

    def end(self, number: int) -> None:
        """Give the turn to the other actor for good."""
        with self._changed:
            self._ended[number] = True
            if self._turn == number:
                if not self._lengths and not self._ended[1 - number]:
                    self.last_length = self._done
                self._lengths = []
                self._switch()

    def _switch(self) -> None:
        if not self._ended[1 - self._turn]:
            self._turn = 1 - self._turn
        self._done = 0
        self._changed.notify_all()
