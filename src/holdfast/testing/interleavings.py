"""Run two actors on one store in every order of their operations, up to a number of switches.

    def save(store: AmendableStore) -> Saved: ...
    def start(store: AmendableStore) -> None: ...

    for ran in interleavings(before, save, start, switches_max=2):
        assert ...ran.outcomes..., ran

Each actor is a thread that waits for its turn before each operation, so that operations happen one
at a time in a chosen order. There are too many orders to try all, but few switches between the
actors are enough to break most wrong protocols: M. Musuvathi, S. Qadeer, Iterative context bounding
for systematic testing of multithreaded programs, PLDI 2007.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import AmendableStore
from holdfast.testing.crashes import store_of
from holdfast.testing.disk import Tree
from holdfast.testing.failing import FailingStore

Actor = Callable[[AmendableStore], Any]
"""Function that works on a store at the same time as another one."""

STUCK_S = 60.0
"""Longest wait for a turn; an actor that waits longer is in a deadlock with the other."""


@dataclass(frozen=True, slots=True)
class Order:
    """An order of the operations of two actors."""

    first: int
    """Actor that begins: 0 or 1."""

    lengths: tuple[int, ...] = ()
    """Number of operations before each switch. After the last one each actor runs to its end."""

    def __str__(self) -> str:
        turns = [f"{(self.first + n) % 2}: {length}" for n, length in enumerate(self.lengths)]
        return f"actor {', '.join([*turns, f'{(self.first + len(turns)) % 2} to its end'])}"


@dataclass(frozen=True, slots=True)
class Ran:
    """Result of one order."""

    order: Order
    store: MemoryStore
    outcomes: tuple[Any, Any]
    """Result of each actor, or the HoldfastError that it raised."""

    trace: tuple[str, ...]
    """Operations in order, each with its actor."""

    def __str__(self) -> str:
        return f"{self.order}; {self.outcomes}:\n  " + "\n  ".join(self.trace)


def interleavings(
    before: Callable[[AmendableStore], object], one: Actor, other: Actor, *, switches_max: int
) -> Iterator[Ran]:
    """Run two actors in every order with at most `switches_max` switches before one of them ends.

    `before` makes the initial content of each store.
    """
    first = MemoryStore()
    before(first)
    tree = tree_of(first)
    waiting = [Order(0), Order(1)]
    with ThreadPoolExecutor(2, thread_name_prefix="actor") as pool:
        while waiting:
            order = waiting.pop()
            turns = _Turns(order)
            store = store_of(tree)
            futures = [
                pool.submit(partial(_act, actor, store, turns, number))
                for number, actor in enumerate((one, other))
            ]
            outcomes = futures[0].result(), futures[1].result()
            yield Ran(order, store, outcomes, tuple(turns.trace))
            if len(order.lengths) < switches_max:
                waiting += [
                    Order(order.first, (*order.lengths, length))
                    for length in range(1, turns.last_length)
                ]


def _act(actor: Actor, store: MemoryStore, turns: _Turns, number: int) -> Any:
    try:
        return actor(FailingStore(store, partial(turns.wait, number)))
    except HoldfastError as error:
        return error
    except BaseException as error:
        error.add_note(f"{turns.order}\n  " + "\n  ".join(turns.trace))
        raise
    finally:
        turns.end(number)


class _Turns:
    """Lets the operations of two threads begin in a given order."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.trace: list[str] = []
        self.last_length = 0
        """Operations after the last switch, if the other actor had not ended: each of them is a
        place for one more switch."""

        self._lengths = list(order.lengths)
        self._turn = order.first
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
                self._turn, self._done = 1 - number, 0
                self._changed.notify_all()

    def _switch(self) -> None:
        self._lengths.pop(0)
        if not self._ended[1 - self._turn]:
            self._turn = 1 - self._turn
        self._done = 0
        self._changed.notify_all()


def tree_of(store: MemoryStore, folder: str = "") -> Tree:
    """Return all files and folders below a folder of a store."""
    tree: dict[str, bytes | None] = {}
    for name in store.list(folder):
        path = f"{folder}/{name}".strip("/")
        if name.endswith("/"):
            tree |= {path: None, **tree_of(store, path)}
        else:
            tree[path] = store.read(path, 0, store.size(path))
    return tree
