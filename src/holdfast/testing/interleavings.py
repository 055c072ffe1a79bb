"""Every order of two actors' operations on one store, up to a bound: races found by no luck.

    def save(store: AmendableStore) -> Saved: ...
    def start(store: AmendableStore) -> None: ...

    for ran in interleavings(before, save, start, switches_max=2):
        assert ...ran.outcomes..., ran

Each actor is a thread with a view of the store of its own. It stops before each operation until it
is its turn, so that the store sees one operation after the other, in an order that is chosen. All
orders are too many; those with few changes of turn are not, and they are where protocols break:
M. Musuvathi, S. Qadeer, Iterative context bounding for systematic testing of multithreaded
programs, PLDI 2007.
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
"""A thing that is done to a store while another one is done to it."""

STUCK_S = 60.0
"""An actor that waits longer for its turn waits for the other one in another way as well."""


@dataclass(frozen=True, slots=True)
class Order:
    """Which actor goes first, and after how many operations the turn changes, each time. After the
    last change each goes on to its end."""

    first: int
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        turns = [f"{(self.first + n) % 2}: {length}" for n, length in enumerate(self.lengths)]
        return f"actor {', '.join([*turns, f'{(self.first + len(turns)) % 2} to its end'])}"


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of one order."""

    order: Order
    store: MemoryStore
    outcomes: tuple[Any, Any]
    """What each actor has returned, or the HoldfastError that it has ended in."""

    trace: tuple[str, ...]
    """The operations, each with its actor."""

    def __str__(self) -> str:
        return f"{self.order}; {self.outcomes}:\n  " + "\n  ".join(self.trace)


def interleavings(
    before: Callable[[AmendableStore], object], one: Actor, other: Actor, *, switches_max: int
) -> Iterator[Ran]:
    """What comes of every order of the operations of two actors in which the turn changes at most
    `switches_max` times before one of them has come to its end. `before` makes what is there."""
    first = MemoryStore()
    before(first)
    tree = dict(_tree_of(first))
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
    """Lets one operation after the other begin, in an order that is given."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.trace: list[str] = []
        self.last_length = 0
        """Operations of whoever had the turn after its last change, where the other one had some
        left then: at each of them the turn can change once more."""

        self._lengths = list(order.lengths)
        self._turn = order.first
        self._done = 0
        """Operations since the turn changed."""

        self._ended = [False, False]
        self._changed = threading.Condition()

    def wait(self, number: int, verb: str, key: str) -> None:
        """Return once the operation that actor `number` is about to do may begin. The one before
        it has ended by then, and only then the turn changes."""
        with self._changed:
            if self._turn == number and self._lengths and self._done == self._lengths[0]:
                self._change()
            if not self._changed.wait_for(lambda: self._turn == number, STUCK_S):
                raise AssertionError(f"actor {number} waits for its turn for ever")
            self._done += 1
            self.trace.append(f"{number}: {verb} {key}")

    def end(self, number: int) -> None:
        """The actor has come to its end."""
        with self._changed:
            self._ended[number] = True
            if self._turn == number:
                if not self._lengths and not self._ended[1 - number]:
                    self.last_length = self._done
                self._lengths = []
                self._turn, self._done = 1 - number, 0
                self._changed.notify_all()

    def _change(self) -> None:
        self._lengths.pop(0)
        if not self._ended[1 - self._turn]:
            self._turn = 1 - self._turn
        self._done = 0
        self._changed.notify_all()


def _tree_of(store: MemoryStore, folder: str = "") -> Iterator[tuple[str, bytes | None]]:
    for name in store.list(folder):
        path = f"{folder}/{name}".strip("/")
        if name.endswith("/"):
            yield path, None
            yield from _tree_of(store, path)
        else:
            yield path, store.read(path, 0, store.size(path))


def tree_of(store: MemoryStore) -> Tree:
    """Everything in a store."""
    return dict(_tree_of(store))
