"""Holdfast's process groups have the timeout of the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import constants
from torch.distributed.constants import default_pg_timeout

from holdfast.comm import GroupRanks, _timeout_of


@pytest.fixture(params=[timedelta(seconds=77), None])
def timeout(request: pytest.FixtureRequest) -> Iterator[timedelta]:
    """A default group of this process alone, with this timeout or torch's own."""
    asked: timedelta | None = request.param
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=asked)
    yield asked or default_pg_timeout
    dist.destroy_process_group()


def test_a_group_of_our_own_waits_as_long_as_the_callers(timeout: timedelta) -> None:
    """Method: the group that `all_ranks` makes of several ranks, and its duplicate."""
    world = dist.group.WORLD
    assert world is not None
    assert _timeout_of(world) == timeout
    duplicate = GroupRanks(world).duplicate()
    assert isinstance(duplicate, GroupRanks)
    assert _timeout_of(duplicate._group) == timeout
    duplicate.close()


def test_a_group_of_our_own_has_not_the_default_timeout_of_nccl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Method: groups whose backends state NCCL's default of ten minutes; its own is longer, since
    ranks wait while others write. A time-out that the caller chose stays."""

    def group(*minutes: float) -> Any:
        options = [SimpleNamespace(_timeout=timedelta(minutes=each)) for each in minutes]
        backends = dict(enumerate(SimpleNamespace(options=one) for one in options))
        return SimpleNamespace(_device_types=[*backends], _get_backend=backends.__getitem__)

    monkeypatch.setattr(constants, "default_pg_nccl_timeout", timedelta(minutes=10))
    assert _timeout_of(group(10)) is None
    assert _timeout_of(group(5)) == timedelta(minutes=5)
    assert _timeout_of(group(5, 10)) == timedelta(minutes=5)
    assert _timeout_of(group(30, 10)) == timedelta(minutes=30)
