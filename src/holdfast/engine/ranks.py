"""The ranks of a job, and how what one of them meets reaches all. Below `trainer` the only door to
`torch.distributed`."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from xxhash import xxh3_128_digest

from holdfast.errors import HoldfastError, RankError, StorageError

T = TypeVar("T")
U = TypeVar("U")


class Ranks(Protocol):
    """The processes that save and load together.

    Collective: every method is called by all of them, in the same order. Items cross by pickle.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, item: T) -> list[T]:
        """Every rank's item, in order, on rank 0; elsewhere an empty list."""
        ...

    def scatter(self, items: list[T]) -> T:
        """The item that rank 0 has at this rank's place; other ranks pass an empty list."""
        ...

    def broadcast(self, item: T) -> T:
        """Rank 0's item, on all."""
        ...

    def twin(self) -> Ranks:
        """The same ranks over a channel of their own, so that a thread can use it meanwhile."""
        ...

    def close(self) -> None:
        """Give the channel back; nothing is called after it."""
        ...

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """For each place the largest number of any rank. Cheap enough for every step."""
        ...


class Solo:
    """One process alone."""

    rank = 0
    size = 1

    def gather(self, item: T) -> list[T]:
        return [item]

    def scatter(self, items: list[T]) -> T:
        return items[0]

    def broadcast(self, item: T) -> T:
        return item

    def twin(self) -> Ranks:
        return self

    def close(self) -> None:
        pass

    def largest(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)


class GroupRanks:
    """The ranks of a `torch.distributed` process group that can carry host memory (gloo)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._root = dist.get_global_rank(group, 0)

    def gather(self, item: T) -> list[T]:
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        self._reach(lambda: dist.gather_object(item, gathered, self._root, self._group))
        return gathered or []

    def scatter(self, items: list[T]) -> T:
        out: list[Any] = [None]
        sent: Any = items if self.rank == 0 else None
        self._reach(lambda: dist.scatter_object_list(out, sent, self._root, self._group))
        scattered: T = out[0]
        return scattered

    def broadcast(self, item: T) -> T:
        items = [item]
        self._reach(lambda: dist.broadcast_object_list(items, self._root, self._group))
        return items[0]

    def twin(self) -> Ranks:
        return GroupRanks(dist.new_group(dist.get_process_group_ranks(self._group), backend="gloo"))

    def close(self) -> None:
        dist.destroy_process_group(self._group)

    def largest(self, numbers: Sequence[float]) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self._reach(lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group))
        return tensor.tolist()

    def _reach(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size} lost another rank while checkpointing: {error}",
                hint="look for the first error among the other ranks, then start the run again: "
                "it goes on from the newest good step",
            ) from error


def all_ranks() -> Ranks:
    """The ranks of this job: those of the default process group, or this process alone.

    Collective: makes a gloo group of its own, so that nothing mixes with training's traffic.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Solo()
    return GroupRanks(dist.new_group(backend="gloo"))


def conclude(ranks: Ranks, mine: T | HoldfastError, work: Callable[[list[T]], U]) -> U:
    """What `work` makes on rank 0 of every rank's item, on every rank.

    Collective: every rank calls this once; a rank that failed passes its error. Where any rank did,
    or `work` fails, every rank raises: the first failing rank's error, under its class, with the
    number of the rank. One message from each rank, and one back.
    """
    items = ranks.gather(mine)
    outcome: U | HoldfastError | None = None
    if ranks.rank == 0:
        failed = [(r, e) for r, e in enumerate(items) if isinstance(e, HoldfastError)]
        if failed:
            outcome = failed[0][1] if ranks.size == 1 else _of_rank(*failed[0])
        else:
            outcome = outcome_of(lambda: work(cast("list[T]", items)))
    return _or_raise(ranks.broadcast(cast("U | HoldfastError", outcome)))


def on_rank_0(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; or its error, on every rank.

    Collective: every rank calls this once; `work` runs on rank 0 alone.
    """
    outcome = outcome_of(work) if ranks.rank == 0 else None
    return _or_raise(ranks.broadcast(cast("T | HoldfastError", outcome)))


def on_every_rank(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gives on this rank, once it went well on all; else as `conclude`.

    Collective: every rank calls this once.
    """
    mine = outcome_of(work)
    conclude(ranks, mine if isinstance(mine, HoldfastError) else None, lambda _: None)
    return _or_raise(mine)


def gather_distinct(ranks: Ranks, parts: Mapping[str, T]) -> list[dict[str, T]]:
    """Every rank's parts, in order, on rank 0; elsewhere an empty list.

    What several ranks have alike crosses once, and is one object there: each rank sends a digest
    of each part, then those that rank 0 asks it for. Collective.
    """
    packed = {name: pickle.dumps(part) for name, part in parts.items()}
    digests = ranks.gather({name: xxh3_128_digest(data) for name, data in packed.items()})
    owners: dict[bytes, tuple[int, str]] = {}
    for rank, theirs in enumerate(digests):
        for name, digest in theirs.items():
            owners.setdefault(digest, (rank, name))
    asked: list[list[str]] = [[] for _ in digests]
    for rank, name in owners.values():
        asked[rank].append(name)
    sent = ranks.gather({name: packed[name] for name in ranks.scatter(asked)})
    held = {digest: pickle.loads(sent[r][name]) for digest, (r, name) in owners.items()}
    return [{name: held[digest] for name, digest in theirs.items()} for theirs in digests]


def _of_rank(rank: int, error: HoldfastError) -> HoldfastError:
    return type(error)(f"rank {rank}: {error.what}", hint=error.hint)


def outcome_of(work: Callable[[], T]) -> T | HoldfastError:
    """What `work` gives, or the error that it ends in, to be carried to where it can be raised."""
    try:
        return work()
    except HoldfastError as error:
        return error
    except OSError as error:
        return StorageError(f"{error}")
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for it
        return HoldfastError(
            f"unexpected {type(error).__name__}: {error}",
            hint="".join(traceback.format_exception(error)),
        )


def _or_raise(outcome: T | HoldfastError) -> T:
    if isinstance(outcome, HoldfastError):
        raise outcome
    return outcome


def host_name() -> str:
    return os.uname().nodename
