"""Run ranks as threads of one process."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from holdfast.comm import Ranks, Sending
from holdfast.errors import RankError

T = TypeVar("T")


class ThreadRanks:
    """A rank that is a thread of this process.

    Ranks receive deep copies of items, as if the items were pickled. If a rank dies, the next
    exchange fails on the other ranks, as in a process group.
    """

    def __init__(self, rank: int, board: _Board, host: str | None = None) -> None:
        self.rank = rank
        self.host = host
        """Name of the host that this rank pretends to be on; None for the real one."""
        self.size: int = board.size
        self._board = board
        self._num_exchanges = 0
        self._num_duplicates = 0

    def gather(self, item: T) -> list[T]:
        items = self._exchange(item)
        return items if self.rank == 0 else []

    def scatter(self, items: list[T]) -> T:
        scattered: T = self._exchange(items)[0][self.rank]
        return scattered

    def broadcast(self, item: T) -> T:
        broadcast: T = self._exchange(item)[0]
        return broadcast

    def duplicate(self) -> ThreadRanks:
        self._num_duplicates += 1
        board = self._board.duplicate(self._num_duplicates)
        return ThreadRanks(self.rank, board, self.host)

    def close(self) -> None:
        pass

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        return [max(places) for places in zip(*self._exchange(numbers), strict=True)]

    def send(self, rank: int, data: torch.Tensor) -> Sending:
        self._board.send(self.rank, rank, data.clone())
        return lambda: None

    def receive(self, rank: int, into: torch.Tensor) -> None:
        into.copy_(self._board.receive(rank, self.rank))

    def _exchange(self, item: Any) -> list[Any]:
        self._num_exchanges += 1
        return self._board.exchange(self._num_exchanges, self.rank, item)


class _Board:
    """Shared memory for the items that ranks exchange, by number of the exchange."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._items: dict[int, dict[int, Any]] = {}
        self._sent: dict[tuple[int, int], deque[torch.Tensor]] = {}
        """Tensors that were sent and not yet received, by sender and receiver."""

        self._gone: set[int] = set()
        self._duplicates: dict[int, _Board] = {}

    def exchange(self, number: int, rank: int, item: Any) -> list[Any]:
        with self._changed:
            items = self._items.setdefault(number, {})
            items[rank] = copy.deepcopy(item)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: len(items) == self.size or self._gone - items.keys(), self._timeout_s
            )
            if len(items) < self.size:
                raise RankError(f"rank {rank} lost another rank")
            # A rank enters an exchange only after it has left the one before. All have entered this
            # one, so no rank needs the items of earlier exchanges.
            self._items.pop(number - 2, None)
            return copy.deepcopy([items[other] for other in range(self.size)])

    def send(self, rank: int, to: int, data: torch.Tensor) -> None:
        with self._changed:
            self._sent.setdefault((rank, to), deque()).append(data)
            self._changed.notify_all()

    def receive(self, rank: int, to: int) -> torch.Tensor:
        with self._changed:
            sent = self._sent.setdefault((rank, to), deque())
            self._changed.wait_for(lambda: sent or rank in self._gone, self._timeout_s)
            if not sent:
                raise RankError(f"rank {to} lost another rank")
            return sent.popleft()

    def leave(self, rank: int) -> None:
        """Note that a rank has ended. Exchanges that it has not entered fail on the other ranks."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()
            for duplicate in self._duplicates.values():
                duplicate.leave(rank)

    def duplicate(self, number: int) -> _Board:
        with self._changed:
            return self._duplicates.setdefault(number, _Board(self.size, self._timeout_s))


def run_ranks(
    size: int,
    work: Callable[[Ranks], T],
    *,
    timeout_s: float = 30.0,
    hosts: Sequence[str] | None = None,
) -> list[T]:
    """Run `work` on `size` ranks, each a thread of this process. Return the result of each.

    `hosts`: name of the host that each rank pretends to be on.

    Raise the first error in rank order, but a `RankError` only if there is no other error. A rank
    that waits longer than `timeout_s` for the others fails.
    """
    results = try_ranks(size, work, timeout_s=timeout_s, hosts=hosts)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, RankError)):
        raise error
    return [result for result in results if not isinstance(result, BaseException)]


def try_ranks(
    size: int,
    work: Callable[[Ranks], T],
    *,
    timeout_s: float = 30.0,
    hosts: Sequence[str] | None = None,
) -> list[T | BaseException]:
    """Like `run_ranks`, but return the error of a failed rank in place of its result."""
    board = _Board(size, timeout_s)

    def run(rank: int) -> T | BaseException:
        try:
            return work(ThreadRanks(rank, board, hosts[rank] if hosts else None))
        except BaseException as error:  # noqa: BLE001 - returned to the caller
            board.leave(rank)
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
