"""Collective operations on the ranks of a job, and errors that reach every rank.

Outside of `trainer`, no other module calls collectives of `torch.distributed`.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from xxhash import xxh3_128_digest

from holdfast.errors import HoldfastError, RankError
from holdfast.failures import tried

T = TypeVar("T")
U = TypeVar("U")

_LENGTH = struct.Struct("<q")
"""Header of a message: length of the message in bytes, header included."""

_FIRST_BYTES = 256
"""Number of bytes of a message that are sent before the receiver knows the message's length. Most
messages fit into them, and need one collective instead of two. A collective costs milliseconds
where processes share cores."""

_REPORT_S = 5.0
"""Seconds that a rank which has lost another rank waits for the others to report a loss too. A rank
that hangs, has ended or has not begun reports nothing."""

_STAGES = {
    "manager.arguments": "the start of `save`",
    "manager.step_saver": "the start of `save`",
    "manager.saver": "a save",
    "manager.loader": "a load",
    "saving.host_file": "the write of a host's file",
    "saving.save": "the plan of a save",
    "saving.planner": "the plan of a save",
    "saving.commit": "the commit of a save",
    "tier.local": "a step of the fast tier",
    "tier.drain": "the copy of a checkpoint from the fast tier",
    "loading.load": "a load",
    "loading.replicas": "a load",
    "loading.opening": "a load",
}
"""Description of the collectives in each module, for messages."""

_FEW_RANKS = 64
"""Maximum number of ranks for which `gather` sends the first bytes of every message to every rank.
With 2,048 ranks, each rank would receive half a MiB per `gather`."""

Sending = Callable[[], object]
"""Function that waits until the data has been sent. Only then may the memory change."""


class Ranks(Protocol):
    """The processes that save and load together.

    Collective: all ranks call every method, in the same order. Items are pickled.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, item: T) -> list[T]:
        """Collect the items of all ranks on rank 0, in rank order; elsewhere return `[]`."""
        ...

    def scatter(self, items: list[T]) -> T:
        """Return `items[rank]` of rank 0's list. Other ranks pass an empty list."""
        ...

    def broadcast(self, item: T) -> T:
        """Return rank 0's item on every rank."""
        ...

    def duplicate(self) -> Ranks:
        """Return the same ranks with a separate channel, for use by another thread."""
        ...

    def close(self) -> None:
        """Free the channel. No other method may be called afterwards."""
        ...

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        """Return the elementwise maximum over all ranks. It is cheap enough for every step."""
        ...

    def send(self, rank: int, data: torch.Tensor) -> Sending:
        """Start to send host memory to `rank`, which must `receive` it. Not collective.

        Call the returned function before `data` changes. Messages arrive in the order of sending.
        """
        ...

    def receive(self, rank: int, into: torch.Tensor) -> None:
        """Fill `into` with data of the same size from `rank`. Blocks. Not collective."""
        ...


class Solo:
    """`Ranks` of a single process."""

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
    """`Ranks` of a `torch.distributed` process group that can send host memory (gloo)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self._root = dist.get_global_rank(group, 0)

    def gather(self, item: T) -> list[T]:
        message = _message(item)
        if self.size > _FEW_RANKS:
            return self._gather_at_once(message)
        firsts = [_empty(_FIRST_BYTES) for _ in range(self.size)]
        first = _part(message, 0, _FIRST_BYTES)
        self._checked(lambda: dist.all_gather(firsts, first, self._group))
        longest = max(map(_length, firsts))
        rests = [_empty(0)] * self.size
        if longest > _FIRST_BYTES:
            rest = _part(message, _FIRST_BYTES, longest)
            rests = [torch.empty_like(rest) for _ in rests] if self.rank == 0 else []
            self._checked(lambda: dist.gather(rest, rests or None, self._root, self._group))
        return list(map(_item, firsts, rests)) if self.rank == 0 else []

    def _gather_at_once(self, message: bytes) -> list[Any]:
        """Gather by sending every message to rank 0 only."""
        longest = int(self.all_reduce_max([len(message)])[0])
        whole = _part(message, 0, longest)
        parts = [torch.empty_like(whole) for _ in range(self.size)] if self.rank == 0 else []
        self._checked(lambda: dist.gather(whole, parts or None, self._root, self._group))
        return [_item(part, _empty(0)) for part in parts]

    def scatter(self, items: list[T]) -> T:
        pickles = [pickle.dumps(item) for item in items]
        # Each header states the length of the longest message, since a scatter sends the same
        # number of bytes to each rank.
        length = _LENGTH.size + max(map(len, pickles), default=0)
        messages = [_LENGTH.pack(length) + data for data in pickles]
        first, rest = _empty(_FIRST_BYTES), _empty(0)
        firsts = [_part(message, 0, _FIRST_BYTES) for message in messages] or None
        self._checked(lambda: dist.scatter(first, firsts, self._root, self._group))
        if (length := _length(first)) > _FIRST_BYTES:
            rest = _empty(length - _FIRST_BYTES)
            rests = [_part(message, _FIRST_BYTES, length) for message in messages] or None
            self._checked(lambda: dist.scatter(rest, rests, self._root, self._group))
        scattered: T = _item(first, rest)
        return scattered

    def broadcast(self, item: T) -> T:
        message = _message(item) if self.rank == 0 else b""
        first, rest = _part(message, 0, _FIRST_BYTES), _empty(0)
        self._checked(lambda: dist.broadcast(first, self._root, self._group))
        if (length := _length(first)) > _FIRST_BYTES:
            rest = _part(message, _FIRST_BYTES, length)
            self._checked(lambda: dist.broadcast(rest, self._root, self._group))
        received: T = item if self.rank == 0 else _item(first, rest)
        return received

    def duplicate(self) -> Ranks:
        return GroupRanks(_new_group(self._group))

    def close(self) -> None:
        dist.destroy_process_group(self._group)

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self._checked(lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group))
        return tensor.tolist()

    def send(self, rank: int, data: torch.Tensor) -> Sending:
        work = self._checked(lambda: dist.isend(data, group=self._group, group_dst=rank))
        assert work is not None
        return lambda: self._checked(work.wait)

    def receive(self, rank: int, into: torch.Tensor) -> None:
        self._checked(lambda: dist.recv(into, group=self._group, group_src=rank))

    def _checked(self, exchange: Callable[[], T]) -> T:
        """Return the result of `exchange`; raise `RankError` where it fails."""
        try:
            return exchange()
        except RuntimeError as error:
            raise _lost(self._group, error, "while checkpointing") from error


def _lost(group: dist.ProcessGroup, error: RuntimeError, when: str) -> RankError:
    """Return the error of a failed exchange. Its message names the ranks that report no failure."""
    rank, size, stage = dist.get_rank(group), dist.get_world_size(group), _stage()
    silent = _silent_ranks(group, rank, size)
    named = f"; no sign of rank {', '.join(map(str, silent))}" if silent else ""
    return RankError(
        f"rank {rank} of {size} lost another rank {when}, at {stage}{named}: {error}",
        hint="look for the first error among the other ranks, or for what they wait (`py-spy dump "
        "--pid`), then start the run again: it resumes from the newest good checkpoint",
    )


def _silent_ranks(group: dist.ProcessGroup, rank: int, size: int) -> list[int]:
    """Return the ranks that do not report within `_REPORT_S` that they have lost another rank too.
    Return `[]` if the key-value store of torch.distributed is gone."""
    key = f"holdfast/lost/{group.group_name}"
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{key}/{rank}", "")
        # Only the first rank that comes here looks for all reports: each look is a request, and one
        # server answers the requests of all ranks.
        is_first = store.add(f"{key}/number", 1) == 1
        missing = [other for other in range(size) if other != rank]
        deadline = time.monotonic() + _REPORT_S * (1 if is_first else 2)
        while time.monotonic() < deadline:
            if is_first:
                missing = [other for other in missing if not store.check([f"{key}/{other}"])]
            elif store.check([f"{key}/silent"]):
                return list(map(int, store.get(f"{key}/silent").decode().split()))
            if not missing:
                break
            time.sleep(0.1)
        if not is_first:
            return []
        store.set(f"{key}/silent", " ".join(map(str, missing)))
    except RuntimeError:
        return []
    return missing


def _stage() -> str:
    """Describe the collective that this thread is in."""
    frame = sys._getframe(1)
    function = "a collective"
    while frame.f_back is not None:
        frame = frame.f_back
        package, _, module = frame.f_globals.get("__name__", "").partition(".")
        if package == "holdfast" and module != "comm":
            if module in _STAGES:
                return _STAGES[module]
            function = f"`{frame.f_code.co_name}`"
    return function


def _new_group(beside: dist.ProcessGroup) -> dist.ProcessGroup:
    """Make a gloo group of the ranks of `beside`, with the same time-out. Collective."""
    try:
        group: dist.ProcessGroup = dist.new_group(
            dist.get_process_group_ranks(beside), timeout=_timeout_of(beside), backend="gloo"
        )
    except RuntimeError as error:
        raise _lost(beside, error, "while all of them connect") from error
    return group


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Return the longest time-out of the backends of a group: the user chose it for the whole job.

    Ignore NCCL's default: it is meant for collectives on GPUs, and is too short for ranks that wait
    for the writes of others. If no other time-out is left, return None: torch's default for gloo.
    """
    # Imported here, since a torch that is built without distributed lacks the module.
    from torch.distributed.constants import default_pg_nccl_timeout

    backends = [group._get_backend(device) for device in group._device_types]
    options: list[Any] = [getattr(backend, "options", None) for backend in backends]
    stated = (o._timeout for o in options if hasattr(o, "_timeout"))
    return max((t for t in stated if t != default_pg_nccl_timeout), default=None)


def _empty(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _message(item: object) -> bytes:
    data = pickle.dumps(item)
    return _LENGTH.pack(_LENGTH.size + len(data)) + data


def _part(message: bytes, start: int, stop: int) -> torch.Tensor:
    """Copy bytes `start` to `stop` of a message, with zeros after its end."""
    part = memoryview(message)[start:stop]
    padded = torch.zeros(stop - start, dtype=torch.uint8, device="cpu")
    padded.numpy()[: len(part)] = part
    return padded


def _length(first: torch.Tensor) -> int:
    length: int = _LENGTH.unpack_from(first.numpy().data)[0]
    return length


def _item(first: torch.Tensor, rest: torch.Tensor) -> Any:
    # `loads` stops where the pickle ends and ignores the padding.
    return pickle.loads(first.numpy()[_LENGTH.size :].tobytes() + rest.numpy().tobytes())


def all_ranks() -> Ranks:
    """Return the ranks of the default process group, or `Solo` where there is none.

    Collective: makes a separate gloo group, so that its messages do not mix with those of training.
    The group has the time-out of the default group. If ranks do not join, the error names them.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Solo()
    world = dist.group.WORLD
    assert world is not None, "`is_initialized` has checked it"
    return GroupRanks(_new_group(world))


def gather_and_run(ranks: Ranks, item: T | HoldfastError, work: Callable[[list[T]], U]) -> U:
    """Run `work` on rank 0 with the items of all ranks, and return its result on every rank.

    Collective: every rank calls this once. A rank that failed passes its error as `item`. If any
    rank passes an error, or if `work` fails, every rank raises the error of the lowest failing
    rank, with its class and the number of the rank. Costs one `gather` and one `broadcast`.
    """
    items = ranks.gather(item)
    outcome: U | HoldfastError | None = None
    if ranks.rank == 0:
        failed = [(r, e) for r, e in enumerate(items) if isinstance(e, HoldfastError)]
        if failed:
            outcome = failed[0][1] if ranks.size == 1 else _of_rank(*failed[0])
        else:
            outcome = capture(lambda: work(cast("list[T]", items)))
    result = ranks.broadcast(cast("U | HoldfastError", outcome))
    _raise_interrupt(item)
    _raise_interrupt(outcome)
    if isinstance(result, HoldfastError) and isinstance(item, HoldfastError):
        # A broadcast drops the cause of an error. If this rank sent the error, restore the cause.
        result.__cause__ = result.__cause__ or (
            item.__cause__ if result.what.endswith(item.what) else None
        )
    return _or_raise(result)


def run_on_rank_0(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone, and return its result, or raise its error, on every rank.

    Collective: every rank calls this once.
    """
    outcome = capture(work) if ranks.rank == 0 else None
    result = ranks.broadcast(cast("T | HoldfastError", outcome))
    _raise_interrupt(outcome)
    return _or_raise(result)


def run_on_all(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on every rank, and return this rank's result once all ranks have succeeded.

    Collective: every rank calls this once. If any rank fails, every rank raises, as in
    `gather_and_run`. Without errors it costs one `all_reduce_max`.
    """
    outcome = capture(work)
    error = outcome if isinstance(outcome, HoldfastError) else None
    if ranks.all_reduce_max([error is not None])[0]:
        gather_and_run(ranks, error, lambda _: None)
    return _or_raise(outcome)


def gather_deduplicated(ranks: Ranks, items: Mapping[str, T]) -> list[dict[str, T]]:
    """Collect the named items of all ranks on rank 0, in rank order. Return `[]` on other ranks.

    Collective: equal items of several ranks are sent once and are one object on rank 0. Each rank
    sends a digest of each item, then the items that rank 0 requests from it.
    """
    if ranks.size == 1:
        return [dict(items)]
    pickles = {name: pickle.dumps(item) for name, item in items.items()}
    digests = ranks.gather({name: xxh3_128_digest(data) for name, data in pickles.items()})
    owners: dict[bytes, tuple[int, str]] = {}
    for rank, digest_by_name in enumerate(digests):
        for name, digest in digest_by_name.items():
            owners.setdefault(digest, (rank, name))
    requests: list[list[str]] = [[] for _ in digests]
    for rank, name in owners.values():
        requests[rank].append(name)
    sent = ranks.gather({name: pickles[name] for name in ranks.scatter(requests)})
    distinct = {digest: pickle.loads(sent[r][name]) for digest, (r, name) in owners.items()}
    return [{n: distinct[digest] for n, digest in by_name.items()} for by_name in digests]


def _of_rank(rank: int, error: HoldfastError) -> HoldfastError:
    return error.reworded(f"rank {rank}: {error.what}")


def capture(work: Callable[[], T]) -> T | HoldfastError:
    """Return the result of `work`, or its error as a value that can be sent to other ranks, also if
    it is an interrupt. Use `tried` where no other rank waits."""
    try:
        return tried(work)
    except BaseException as interrupt:  # noqa: BLE001 - raised once the other ranks know
        interrupted = RankError(
            f"interrupted by {type(interrupt).__name__}",
            hint="start the run again: it resumes from the newest good checkpoint",
        )
        interrupted.__cause__ = interrupt
        return interrupted


def _raise_interrupt(outcome: object) -> None:
    """Raise the interrupt of this rank, if `outcome` is an error that an interrupt caused.

    A process that was told to end must end, even if its code catches the error.
    """
    cause = outcome.__cause__ if isinstance(outcome, HoldfastError) else None
    if cause is not None and not isinstance(cause, Exception):
        raise cause


def _or_raise(outcome: T | HoldfastError) -> T:
    if isinstance(outcome, HoldfastError):
        raise outcome
    return outcome


def host_name() -> str:
    return os.uname().nodename


def host_of(ranks: Ranks) -> str:
    """Return the name of this rank's host. Ranks in tests state it as their attribute `host`."""
    return getattr(ranks, "host", None) or host_name()


def hosts_of(ranks: Ranks) -> list[str]:
    """Return the name of each rank's host. If machines have the same name, number their names.

    Collective: every rank calls this.
    """
    found = ranks.gather((host_of(ranks), _boot_id()))
    boots: dict[str, list[str]] = {}
    names = []
    for name, boot in found:
        known = boots.setdefault(name, [])
        if boot not in known:
            known.append(boot)
        number = known.index(boot)
        names.append(f"{name}#{number + 1}" if number else name)
    return ranks.broadcast(names)


def _boot_id() -> str:
    """Return the boot ID of the machine. It is the same in all Docker containers of a machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""


def is_restarted_on_failure() -> bool:
    """Whether `torchrun` started this process. It starts all processes again if one of them ends
    with an exit status other than 0."""
    return dist.is_available() and dist.is_torchelastic_launched()
