"""Ranks as threads: collectives of the engine without a process a rank."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from holdfast.engine.ranks import Ranks
from holdfast.errors import RankError

T = TypeVar("T")


class ThreadRanks:
    """One of several ranks that are threads of this process.

    Items cross by deep copy, as they would by pickle. A rank that dies takes the others' next
    exchange with it, as a process group does.
    """

    def __init__(self, rank: int, board: _Board) -> None:
        self.rank = rank
        self.size = board.size
        self._board = board

    def gather(self, item: T) -> list[T]:
        items = self._exchange(item)
        return items if self.rank == 0 else []

    def scatter(self, items: list[T]) -> T:
        scattered: T = self._exchange(items)[0][self.rank]
        return scattered

    def broadcast(self, item: T) -> T:
        broadcast: T = self._exchange(item)[0]
        return broadcast

    def _exchange(self, item: Any) -> list[Any]:
        board = self._board
        try:
            board.items[self.rank] = item
            board.barrier.wait()
            items = [copy.deepcopy(i) for i in board.items]
            board.barrier.wait()
        except threading.BrokenBarrierError:
            raise RankError(f"rank {self.rank} lost another rank") from None
        return items

    def leave(self) -> None:
        """This rank takes part no more: the others' exchanges fail from now on."""
        self._board.barrier.abort()


class _Board:
    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self.items: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)


def run_ranks(size: int, work: Callable[[Ranks], T], *, timeout_s: float = 30.0) -> list[T]:
    """What `work` gives on each of `size` ranks. Raises the error of the lowest rank that failed;
    a rank that waits for others longer than `timeout_s` fails."""
    results = try_ranks(size, work, timeout_s=timeout_s)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, RankError):
            raise result
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def try_ranks(
    size: int, work: Callable[[Ranks], T], *, timeout_s: float = 30.0
) -> list[T | BaseException]:
    """As `run_ranks`, with the error of each rank that failed in its place."""
    board = _Board(size, timeout_s)

    def one(rank: int) -> T | BaseException:
        mine = ThreadRanks(rank, board)
        try:
            return work(mine)
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            mine.leave()
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
