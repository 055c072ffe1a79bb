"""Run actors on one store in every order of their operations, up to a number of switches.

    def save(store: FolderStore) -> Saved: ...
    def start(store: FolderStore) -> None: ...

    for ran in interleavings(before, save, start, switches_max=2):
        assert ...ran.outcomes..., ran

`orders` does the same on a store of another kind, for any number of actors.

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
    outcomes: tuple[Any, ...]
    """Result of each actor, or the HoldfastError that it raised."""

    trace: tuple[str, ...]
    """Operations in order, each with the number of its actor."""

    def __str__(self) -> str:
        return f"{self.outcomes}:\n  " + "\n  ".join(self.trace)


def interleavings(
    before: Callable[[FolderStore], object], one: Actor, other: Actor, *, switches_max: int
) -> Iterator[Ran[MemoryStore]]:
    """Run two actors in every order with at most `switches_max` switches before one of them ends.

    By default, the last switch is made at every sixth place, another sixth after each other first
    turn. `--all` makes it everywhere.

    `before` makes the initial content of each store.
    """
    first = MemoryStore()
    before(first)
    tree = tree_of(first)
    actors = one, other
    yield from orders(lambda: store_of(tree), FailingStore, actors, switches_max=switches_max)


@dataclass(frozen=True, slots=True)
class _Switch:
    """A change of turns."""

    length: int
    """Operations before it, since the last switch."""

    to: int
    """Number of the actor that continues."""


def orders(
    new: Callable[[], S],
    view: Callable[[S, Wait], object],
    actors: Sequence[Actor],
    *,
    switches_max: int,
    stride: int = 1,
) -> Iterator[Ran[S]]:
    """Like `interleavings`, on what `new` makes. `view` gives each actor its own store there.

    Any actor begins. A switch goes to any other one. Where an actor ends, the next in number that
    has not ended continues, which is no switch. `stride`: switches are made at each place of this
    number only.
    """
    numbers = range(len(actors))
    waiting: list[tuple[int, list[_Switch]]] = [(number, []) for number in numbers]
    with ThreadPoolExecutor(len(actors), thread_name_prefix="actor") as pool:
        while waiting:
            begins, switches = waiting.pop()
            turns, store = _Turns(len(actors), begins, switches), new()
            futures = [
                pool.submit(partial(_act, actor, partial(view, store), turns, number))
                for number, actor in enumerate(actors)
            ]
            outcomes = tuple(future.result() for future in futures)
            yield Ran(store, outcomes, tuple(turns.trace))
            if len(switches) < switches_max:
                # One more switch, before each later operation but the first after the last switch.
                places: Sequence[int] = range(1, len(turns.others), stride)
                if len(switches) == switches_max - 1 > 0:
                    places = every(6, places, start=switches[-1].length)
                waiting += [
                    (begins, [*switches, _Switch(length, to)])
                    for length in places
                    for to in numbers
                    if to in turns.others[length]
                ]


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
    """Lets the operations of some threads begin in a given order."""

    def __init__(self, num_actors: int, begins: int, switches: Sequence[_Switch]) -> None:
        """Actor `begins` has the first turn. After the last switch, each actor runs to its end."""
        self.trace: list[str] = []
        self.others: list[frozenset[int]] = []
        """The actors that had not ended, without the one in turn, at each operation since the last
        switch."""

        self._turn = begins
        self._switches = list(switches)
        self._done = 0
        """Operations since the last switch."""

        self._running = set(range(num_actors))
        self._changed = threading.Condition()

    def wait(self, number: int, verb: str, key: str) -> None:
        """Wait until actor `number` may begin its next operation.

        Its previous operation has ended by then; only then may the turn switch.
        """
        with self._changed:
            if self._turn == number and self._switches and self._done == self._switches[0].length:
                self._give_turn_to(self._switches.pop(0).to)
                self._done = 0
            if not self._changed.wait_for(lambda: self._turn == number, STUCK_S):
                raise AssertionError(f"actor {number} never gets its turn")
            self._done += 1
            if not self._switches:
                self.others.append(frozenset(self._running - {number}))
            self.trace.append(f"{number}: {verb} {key}")

    def end(self, number: int) -> None:
        """Give the turn to the next actor that runs."""
        with self._changed:
            self._running.discard(number)
            if self._turn == number:
                self._give_turn_to(number + 1)

    def _give_turn_to(self, number: int) -> None:
        """Give the turn to this actor, or to the next in number that has not ended."""
        if self._running:
            self._turn = min(self._running, key=lambda one: (one < number, one))
        self._changed.notify_all()
