"""The ranks of a job, and how what one of them meets reaches all. Below `trainer` the only door to
`torch.distributed`."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from xxhash import xxh3_128_digest

from holdfast.errors import HoldfastError, RankError
from holdfast.failures import worded

T = TypeVar("T")
U = TypeVar("U")

_HEAD = struct.Struct("<qq")
"""Bytes of this message, and of the longest that goes at the same time."""

_FRAME_BYTES = 256
"""Sent in any case, so that both sides know the length; most messages need no more. A message costs
milliseconds where processes share cores, hardly anything by its bytes."""

_FIRST_BYTES = _FRAME_BYTES - _HEAD.size
"""Of a message, in its frame."""

Sending = Callable[[], object]
"""Returns once what is being sent may change, or be let go."""


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

    def duplicate(self) -> Ranks:
        """The same ranks over a channel of their own, so that a thread can use it meanwhile."""
        ...

    def close(self) -> None:
        """Give the channel back; nothing is called after it."""
        ...

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        """For each place the largest number of any rank. Cheap enough for every step."""
        ...

    def send(self, rank: int, data: torch.Tensor) -> Sending:
        """Begin to send bytes in host memory to another rank; call what is returned before they
        change. Not collective: between two ranks, what is sent first is received first."""
        ...

    def receive(self, rank: int, into: torch.Tensor) -> None:
        """Wait for what another rank sends to this one: as many bytes."""
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

    def duplicate(self) -> Ranks:
        return self

    def close(self) -> None:
        pass

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def send(self, rank: int, data: torch.Tensor) -> Sending:
        raise AssertionError(f"{data.numel()} bytes to rank {rank}: there is no other rank")

    def receive(self, rank: int, into: torch.Tensor) -> None:
        raise AssertionError(f"{into.numel()} bytes from rank {rank}: there is no other rank")


class GroupRanks:
    """The ranks of a `torch.distributed` process group that can carry host memory (gloo)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self._root = dist.get_global_rank(group, 0)

    def gather(self, item: T) -> list[T]:
        data = pickle.dumps(item)
        frames = [
            torch.empty(_FRAME_BYTES, dtype=torch.uint8, device="cpu") for _ in range(self.size)
        ]
        self._reach(lambda: dist.all_gather(frames, _frame(data, len(data)), self._group))
        longest = max(_lengths(frame)[0] for frame in frames)
        rests = [_EMPTY] * self.size
        if longest > _FIRST_BYTES:
            mine = _rest(data, longest)
            rests = [torch.empty_like(mine) for _ in rests] if self.rank == 0 else []
            self._reach(lambda: dist.gather(mine, rests or None, self._root, self._group))
        return list(map(_message, frames, rests)) if self.rank == 0 else []

    def scatter(self, items: list[T]) -> T:
        sent = [pickle.dumps(item) for item in items]
        longest = max(map(len, sent), default=0)
        mine = torch.empty(_FRAME_BYTES, dtype=torch.uint8, device="cpu")
        frames = [_frame(data, longest) for data in sent] or None
        self._reach(lambda: dist.scatter(mine, frames, self._root, self._group))
        longest, rest = _lengths(mine)[1], _EMPTY
        if longest > _FIRST_BYTES:
            rest = torch.empty(longest - _FIRST_BYTES, dtype=torch.uint8, device="cpu")
            rests = [_rest(data, longest) for data in sent] or None
            self._reach(lambda: dist.scatter(rest, rests, self._root, self._group))
        scattered: T = _message(mine, rest)
        return scattered

    def broadcast(self, item: T) -> T:
        data = pickle.dumps(item) if self.rank == 0 else b""
        frame = _frame(data, len(data))
        self._reach(lambda: dist.broadcast(frame, self._root, self._group))
        nbytes, rest = _lengths(frame)[0], _EMPTY
        if nbytes > _FIRST_BYTES:
            rest = _rest(data, nbytes)
            self._reach(lambda: dist.broadcast(rest, self._root, self._group))
        sent: T = item if self.rank == 0 else _message(frame, rest)
        return sent

    def duplicate(self) -> Ranks:
        return GroupRanks(dist.new_group(dist.get_process_group_ranks(self._group), backend="gloo"))

    def close(self) -> None:
        dist.destroy_process_group(self._group)

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self._reach(lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group))
        return tensor.tolist()

    def send(self, rank: int, data: torch.Tensor) -> Sending:
        work = self._reach(lambda: dist.isend(data, group=self._group, group_dst=rank))
        assert work is not None
        return lambda: self._reach(work.wait)

    def receive(self, rank: int, into: torch.Tensor) -> None:
        self._reach(lambda: dist.recv(into, group=self._group, group_src=rank))

    def _reach(self, exchange: Callable[[], T]) -> T:
        try:
            return exchange()
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size} lost another rank while checkpointing: {error}",
                hint="look for the first error among the other ranks, then start the run again: "
                "it goes on from the newest good step",
            ) from error


_EMPTY = torch.empty(0, dtype=torch.uint8, device="cpu")


def _frame(data: bytes, longest: int) -> torch.Tensor:
    """The start of a message, with its length."""
    frame = bytearray(_FRAME_BYTES)
    first = _HEAD.pack(len(data), longest) + data[:_FIRST_BYTES]
    frame[: len(first)] = first
    return torch.frombuffer(frame, dtype=torch.uint8)


def _rest(data: bytes, longest: int) -> torch.Tensor:
    """What the frame has no room for, as long as that of the longest."""
    rest = torch.empty(longest - _FIRST_BYTES, dtype=torch.uint8, device="cpu")
    over = data[_FIRST_BYTES:]
    rest.numpy()[: len(over)] = memoryview(over)
    return rest


def _lengths(frame: torch.Tensor) -> tuple[int, int]:
    nbytes, longest = _HEAD.unpack_from(frame.numpy().data)
    return nbytes, longest


def _message(frame: torch.Tensor, rest: torch.Tensor) -> Any:
    data = frame.numpy()[_HEAD.size :].tobytes() + rest.numpy().tobytes()
    return pickle.loads(data[: _lengths(frame)[0]])


def all_ranks() -> Ranks:
    """The ranks of this job: those of the default process group, or this process alone.

    Collective: makes a gloo group of its own, so that nothing mixes with training's traffic.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Solo()
    return GroupRanks(dist.new_group(backend="gloo"))


def gather_and_run(ranks: Ranks, mine: T | HoldfastError, work: Callable[[list[T]], U]) -> U:
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
            outcome = capture(lambda: work(cast("list[T]", items)))
    told = ranks.broadcast(cast("U | HoldfastError", outcome))
    if isinstance(mine, HoldfastError):
        _raise_interrupt(mine)
    if isinstance(told, HoldfastError) and isinstance(mine, HoldfastError):
        # Of what this rank has met itself it knows the cause, which has not crossed.
        told.__cause__ = told.__cause__ or (
            mine.__cause__ if told.what.endswith(mine.what) else None
        )
    return _or_raise(told)


def run_on_rank_0(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; or its error, on every rank.

    Collective: every rank calls this once; `work` runs on rank 0 alone.
    """
    outcome = capture(work) if ranks.rank == 0 else None
    told = ranks.broadcast(cast("T | HoldfastError", outcome))
    if isinstance(outcome, HoldfastError):
        _raise_interrupt(outcome)
    return _or_raise(told)


def run_on_all(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gives on this rank, once it went well on all; else as `gather_and_run`.

    Collective: every rank calls this once. Errors travel only where there are any.
    """
    mine = capture(work)
    error = mine if isinstance(mine, HoldfastError) else None
    if ranks.all_reduce_max([error is not None])[0]:
        gather_and_run(ranks, error, lambda _: None)
    return _or_raise(mine)


def gather_deduplicated(ranks: Ranks, parts: Mapping[str, T]) -> list[dict[str, T]]:
    """Every rank's parts, in order, on rank 0; elsewhere an empty list.

    What several ranks have alike crosses once, and is one object there: each rank sends a digest
    of each part, then those that rank 0 asks it for. Collective.
    """
    if ranks.size == 1:
        return [dict(parts)]
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


def capture(work: Callable[[], T]) -> T | HoldfastError:
    """What `work` gives, or the error that it ends in, to be carried to where it can be raised."""
    try:
        return work()
    except HoldfastError as error:
        return error
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for it
        return worded(error)
    except BaseException as interrupt:  # noqa: BLE001 - raised once the other ranks know
        told = RankError(
            f"interrupted by {type(interrupt).__name__}",
            hint="start the run again: it goes on from the newest good step",
        )
        told.__cause__ = interrupt
        return told


def _raise_interrupt(mine: HoldfastError) -> None:
    """Raise the interrupt that ended the work of this rank, if one has: a process that is told to
    end does not go on with an error that its code may catch."""
    cause = mine.__cause__
    if cause is not None and not isinstance(cause, Exception):
        raise cause


def _or_raise(outcome: T | HoldfastError) -> T:
    if isinstance(outcome, HoldfastError):
        raise outcome
    return outcome


def host_name() -> str:
    return os.uname().nodename


@dataclass(frozen=True, slots=True)
class Hosts:
    """Where the ranks are."""

    num_hosts: int
    num_local: int
    """Ranks on the host of this one, itself among them."""


def hosts_of(ranks: Ranks) -> Hosts:
    """Where the ranks are. Collective: every rank calls this."""
    mine = host_name()
    names = ranks.broadcast(ranks.gather(mine))
    return Hosts(len({*names}), names.count(mine))
