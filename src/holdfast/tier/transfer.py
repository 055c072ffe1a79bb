"""Send parts of files from the disk of one rank to the disk of another, in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from holdfast.comm import Ranks, Sending, capture, run_on_all
from holdfast.errors import DamagedError, HoldfastError
from holdfast.storage.store import ReadStore, Store

PIECE_BYTES = 4 << 20
"""Maximum bytes of each read, each message between ranks, and each write."""

SENDING = 2
"""Number of pieces that may still be in transfer while the next piece is read."""

Range = tuple[int, int]
"""Bytes `start` to `stop` of a file."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Parts of one file that one rank sends to another."""

    key: str
    """Path of the file in the store of the source."""

    target_key: str
    """Path of the new file in the store of the target."""

    nbytes: int
    """Size of the file, and of the new one."""

    ranges: Sequence[Range]
    """Parts to send. The rest of the new file is undefined."""

    source: int
    """Rank that reads the file."""

    target: int
    """Rank that writes the new file."""

    def pieces(self) -> Iterator[Range]:
        """Yield the parts to send, divided into ranges of at most `PIECE_BYTES`."""
        for start, stop in self.ranges:
            for first in range(start, stop, PIECE_BYTES):
                yield first, min(first + PIECE_BYTES, stop)


def transfer(transfers: Sequence[Transfer], store: Store, ranks: Ranks) -> None:
    """Send parts of files between the disks of ranks.

    `transfers`: the same on every rank. `store`: the disk of this rank. The content of new files is
    durable; their folder is not synced.

    Collective: every rank calls this. An error of one rank is raised on all; files are incomplete
    then.
    """
    errors: list[HoldfastError] = []
    # All ranks follow the same order, so ranks cannot wait for each other in a circle.
    for item in transfers:
        if ranks.rank == item.source:
            errors += _send(item, store, ranks)
        elif ranks.rank == item.target:
            errors += _receive(item, store, ranks)

    def raise_first() -> None:
        for error in errors:
            raise error

    run_on_all(ranks, raise_first)


def _send(item: Transfer, store: ReadStore, ranks: Ranks) -> list[HoldfastError]:
    """Send the parts of a file to the other rank. Return the error, if there was one.

    After an error, send all further messages without content, since the other rank waits for them.
    """
    sending: deque[Sending] = deque()
    error: HoldfastError | None = None
    for start, stop in item.pieces():
        # The last byte of a message says whether the bytes before it could be read.
        memory = torch.zeros(stop - start + 1, dtype=torch.uint8, device="cpu")
        if error is None:
            outcome = capture(partial(_read, item, store, start, memory))
            error = outcome if isinstance(outcome, HoldfastError) else None
        memory[-1] = error is None
        sending.append(ranks.send(item.target, memory))
        while len(sending) > SENDING:
            sending.popleft()()
    for wait in sending:
        wait()
    return [error] if error is not None else []


def _read(item: Transfer, store: ReadStore, start: int, memory: torch.Tensor) -> None:
    data = store.read(item.key, start, start + len(memory) - 1)
    if len(data) < len(memory) - 1:
        raise DamagedError(f"`{store.url}/{item.key}` ends at byte {start + len(data)}")
    memory.numpy()[: len(data)] = memoryview(data)


def _receive(item: Transfer, store: Store, ranks: Ranks) -> list[HoldfastError]:
    pieces = item.pieces()

    def receive(piece: Range) -> torch.Tensor:
        memory = torch.empty(piece[1] - piece[0] + 1, dtype=torch.uint8, device="cpu")
        ranks.receive(item.source, memory)
        return memory

    def write() -> None:
        with store.create(item.target_key, item.nbytes) as writer:
            for piece in pieces:
                memory = receive(piece)
                if not memory[-1]:
                    raise DamagedError(f"rank {item.source} cannot read `{item.key}`")
                writer.write(piece[0], [memory.numpy()[:-1].data])

    outcome = capture(write)
    # After an error, the source still sends the rest, which must be received.
    for piece in pieces:
        receive(piece)
    return [outcome] if isinstance(outcome, HoldfastError) else []
