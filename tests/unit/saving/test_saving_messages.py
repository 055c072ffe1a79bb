"""Messages between the ranks of a real process group."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch.distributed as dist

from holdfast import comm
from holdfast.comm import _FIRST_BYTES, GroupRanks
from holdfast.format.chunks import ChunkRows, Table
from holdfast.saving.write import WriteResult
from processes import run_processes

SIZE = 3
FITS = _FIRST_BYTES - len(pickle.dumps(b""))
"""Longest `bytes` whose message is sent in one part."""


def exchange(rank: int, size: int) -> None:
    ranks = GroupRanks(dist.new_group(backend="gloo"))
    for num in (0, *range(FITS - 4, FITS + 5), 100_000):
        # The lengths differ, so that only some of the messages need a second part.
        items = [bytes([r]) * (num * (r + 1) // size) for r in range(size)]
        # The second limit makes these few ranks gather as many do.
        for comm._FEW_RANKS in (SIZE, 1):
            assert ranks.gather(items[rank]) == (items if rank == 0 else [])
        assert ranks.scatter(items if rank == 0 else []) == items[rank]
        assert ranks.broadcast(items[rank]) == items[0]
        assert ranks.broadcast(items[-1] if rank == 0 else None) == items[-1]
    ranks.close()


def test_messages_of_any_length_arrive() -> None:
    """Method: lengths around `_FIRST_BYTES`, equal on all ranks and different."""
    run_processes(SIZE, exchange)


@pytest.mark.parametrize("cls", [WriteResult, ChunkRows, Table])
def test_a_message_has_every_field(cls: Any) -> None:
    """Method: each class with a `__reduce__` of its own; each field has another value."""
    numbers = tuple(range(len(fields(cls))))
    sent = object.__new__(cls)
    for field, number in zip(fields(cls), numbers, strict=True):
        object.__setattr__(sent, field.name, number)
    assert sent.__reduce__() == (cls, numbers)
