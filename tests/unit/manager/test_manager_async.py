"""Saving in the background: which state is saved, and where errors are raised."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, Solo
from holdfast.format.manifest import Manifest
from holdfast.format.region import Region
from holdfast.manager.context import RunContext
from holdfast.manager.saver import Saver
from holdfast.planning.file_layout import FileLayout, lay_out, lay_out_file
from holdfast.saving.digests import Replicas
from holdfast.saving.memory import free_memory
from holdfast.saving.save import Pending
from holdfast.saving.stage import Snapshot
from holdfast.storage.local import LocalStore
from holdfast.testing.ranks import run_ranks
from holdfast.timing import Spans

WIDTH = 700
"""A weight of 2 MB: more than one block, and more than a moment to write."""


def manager(folder: Path, ranks: Ranks | None = None, **settings: Any) -> CheckpointManager:
    config = CheckpointConfig(enable=True, async_mode="async", **({"interval": 1} | settings))
    return CheckpointManager(folder, model=nn.Linear(WIDTH, WIDTH), config=config, ranks=ranks)


@pytest.mark.parametrize("size", [1, 3])
def test_a_background_save_holds_the_state_at_the_call_of_save(tmp_path: Path, size: int) -> None:
    """G1, G2: weights change as soon as `save` returns, again and again. Every checkpoint holds
    their values at the call, in full."""

    def work(ranks: Ranks) -> None:
        model = nn.Linear(WIDTH, WIDTH)
        config = CheckpointConfig(enable=True, async_mode="async", interval=1)
        with (
            torch.no_grad(),
            CheckpointManager(tmp_path, model=model, config=config, ranks=ranks) as held,
        ):
            for step in range(1, 7):
                for parameter in model.parameters():
                    parameter.fill_(step)
                assert held.save(step)
                for parameter in model.parameters():
                    parameter.fill_(-1)

    run_ranks(size, work)
    for step in range(1, 7):
        checkpoint = holdfast.open(tmp_path / f"step-{step}")
        for name in ("weight", "bias"):
            assert torch.unique(checkpoint.read(name)).tolist() == [float(step)]


def test_waiting_and_closing_leave_everything_durable(tmp_path: Path) -> None:
    with manager(tmp_path) as held:
        held.save(1)
        held.wait()
        assert (tmp_path / "step-1").is_dir()
        held.save(2)
    assert (tmp_path / "step-2").is_dir()


def test_the_last_step_is_published_when_save_returns(tmp_path: Path) -> None:
    with manager(tmp_path) as held:
        held.save(1, last_step=True)
        assert (tmp_path / "step-1").is_dir()


@contextmanager
def no_file_larger_than(nbytes: int) -> Iterator[None]:
    """Limit the size of files that this process may write: beyond it, the system fails the
    write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1, 3])
def test_the_next_call_raises_the_error_of_a_background_save(tmp_path: Path, size: int) -> None:
    """G7: on every rank, at the next step at the latest, whether it is due or not. The earlier
    checkpoint is unchanged, and nothing of the failed one is left."""

    def work(ranks: Ranks) -> None:
        with manager(tmp_path, ranks, interval=2) as held:
            held.save(2)
            held.wait()
            # The limit is the process's, so one rank sets it for all.
            with no_file_larger_than(100_000) if ranks.rank == 0 else nullcontext():
                ranks.all_reduce_max([0])
                assert held.save(4)
                with pytest.raises(holdfast.StorageError, match="cannot write"):
                    held.wait()
                ranks.all_reduce_max([0])

    run_ranks(size, work)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step-2"}


def test_a_save_that_is_not_due_raises_the_error_too(tmp_path: Path) -> None:
    """G7: not only the next save that is due."""
    with manager(tmp_path, interval=2) as held, no_file_larger_than(100_000):
        held.save(2)
        with pytest.raises(holdfast.StorageError):
            for step in range(3, 20_000, 2):
                held.save(step)
                time.sleep(0.001)


def test_a_run_may_continue_after_a_failed_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G11: with `on_save_error = "warn"` the next save works."""
    with (
        caplog.at_level(logging.WARNING, "holdfast"),
        manager(tmp_path, on_save_error="warn") as held,
    ):
        with no_file_larger_than(100_000):
            held.save(1)
            held.wait()
        held.save(2)
        held.wait()
        timings = held.timings()
    assert (timings.failed_saves, [times.step for times in timings.saves]) == (1, [2])
    assert "a save failed, the run goes on" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step-2"}


def test_a_snapshot_reuses_its_memory() -> None:
    """G13: one copy of the saved tensors, allocated once, at the offsets of the file."""
    weight = torch.arange(30_000, dtype=torch.float32)
    region = Region.whole(weight.shape)
    image = lay_out_file(0, lay_out([("weight", "float32", region)]), [])
    snapshot = Snapshot()
    snapshot.reserve(image.nbytes)
    snapshot.copy(image.tensors, lambda *_: weight)
    copied, before = snapshot.tensor_of(image.tensors[0]), snapshot.nbytes
    weight.zero_()
    assert copied[7] == 7
    assert copied.data_ptr() % 4096 == image.tensors[0].data_offset % 4096 == 64
    snapshot.reserve(image.nbytes)
    snapshot.copy(image.tensors, lambda *_: weight)
    assert copied[7] == 0
    assert snapshot.nbytes == before == image.nbytes


def huge_image() -> FileLayout:
    """The layout of a file that is larger than any memory."""
    free = free_memory()
    assert free is not None
    region = Region.whole((free // 4 + (1 << 28),))
    return lay_out_file(0, lay_out([("weight", "float32", region)]), [])


def test_a_snapshot_that_does_not_fit_is_refused_with_its_size() -> None:
    """G13: before anything is allocated."""
    with pytest.raises(holdfast.UsageError, match="of host memory on this rank"):
        Snapshot().reserve(huge_image().nbytes)


def pending_of(catalog: Catalog) -> Pending:
    """A pending save that needs more memory than there is."""
    nothing: Any = None
    begun = catalog.begin("step-1")
    return Pending(
        catalog,
        begun,
        huge_image(),
        held=nothing,
        tensor_of=nothing,
        index=None,
        facts=Manifest({}, {}, step=1, kind="full"),
        spans=Spans(),
        replicas=Replicas({}, {}),
        stepped=frozenset(),
    )


@pytest.mark.parametrize("policy", ["raise", "wait"])
def test_save_raises_or_waits_if_a_snapshot_does_not_fit(
    tmp_path: Path, policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """G13: the needed and the free memory are logged before the copy; `on_low_memory` decides what
    follows."""
    catalog = Catalog(LocalStore(tmp_path))
    config = CheckpointConfig(enable=True, async_mode="async", on_low_memory=policy)
    saver = Saver(RunContext(catalog, config, Solo()))
    with caplog.at_level(logging.INFO, "holdfast"):
        if policy == "wait":
            assert not saver._has_room(pending_of(catalog))
            assert "training waits for this save" in caplog.text
        else:
            with pytest.raises(holdfast.UsageError, match="of host memory on this rank"):
                saver._has_room(pending_of(catalog))
            assert [*tmp_path.iterdir()] == [], "the attempt is gone"
    assert "of host memory for snapshots" in caplog.text
