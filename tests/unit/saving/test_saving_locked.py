"""Page-locked memory for snapshots, reserved ahead of the first save. The accelerator is a fake."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import fake_accelerator
import holdfast
from fake_accelerator import FakeAccelerator
from holdfast import CheckpointConfig, CheckpointManager, accelerator
from holdfast.comm import Ranks
from holdfast.manager.saver import AHEAD_SPARE_BYTES
from holdfast.saving import memory
from holdfast.saving.memory import HostMemory, threads_to_touch
from holdfast.saving.stage import Snapshot
from holdfast.testing.ranks import run_ranks

DEVICES = (torch.device("cuda", 1),)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    made = FakeAccelerator(2)
    fake_accelerator.use(monkeypatch, made)
    return made


def test_memory_is_locked_on_trainings_device_and_unlocked_before_it_is_freed(
    fake: FakeAccelerator,
) -> None:
    """Method: a snapshot grows, and ends. All its pages are written before the lock."""
    snapshot = Snapshot()
    snapshot.reserve(10_000_000, DEVICES, threads=3)
    assert [c[1:] for c in fake.calls if c[1] == "register"] == [("register", 10_000_000, 1, 1)]
    assert [*fake.locked.values()] == [10_000_000]
    snapshot.reserve(9_000_000, DEVICES)
    snapshot.reserve(11_000_000, DEVICES)
    assert [*fake.locked.values()] == [11_000_000]
    del snapshot
    gc.collect()
    assert not fake.locked


def test_memory_that_is_not_locked_is_replaced_once_tensors_are_on_a_device(
    fake: FakeAccelerator,
) -> None:
    """Method: a snapshot of tensors in host memory, then of others on a device; then one on XPU,
    whose page-locked memory torch allocates."""
    snapshot = Snapshot()
    snapshot.reserve(5_000_000)
    assert not fake.calls
    snapshot.reserve(4_000_000, DEVICES)
    assert [*fake.locked.values()] == [4_000_000]
    other = HostMemory(1000, [torch.device("xpu", 0)])
    assert other.bytes.nbytes == 1000
    assert other.bytes.data_ptr() % 4096 == 0
    assert [c[1:] for c in fake.calls if c[1] == "lock"] == [("lock", 1000 + 4096)]


def test_a_forked_child_unlocks_nothing(
    fake: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: release a lock in a process of another number."""
    lock = accelerator.PageLock(torch.ones(100), DEVICES[0])
    monkeypatch.setattr("os.getpid", lambda: -1)
    lock.release()
    assert [*fake.locked.values()] == [400]


def test_a_driver_that_refuses_is_an_error_with_the_size(fake: FakeAccelerator) -> None:
    """Method: the driver answers with an error. A reservation ahead keeps it for the save."""
    fake.status = 2
    with pytest.raises(holdfast.UsageError, match=r"did not page-lock 10.0 MB .* CUDA error 2"):
        Snapshot().reserve(10_000_000, DEVICES)
    snapshot = Snapshot()
    snapshot.reserve_ahead(10_000_000, DEVICES, threads=2)
    assert snapshot.nbytes == 0
    with pytest.raises(holdfast.UsageError, match="CUDA error 2"):
        snapshot.reserve(10_000_000, DEVICES)


def test_every_page_is_made_before_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method: memory of ones, with each number of threads; the first byte of every page is 0."""
    for threads in (1, 2, 3, 8):
        ones = torch.ones(4096 * 13 + 5, dtype=torch.uint8)
        memory._touch(ones, threads)
        assert not ones[::4096].any()
        assert ones.count_nonzero() == len(ones) - 14
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    assert [threads_to_touch(n) for n in (1, 2, 4, 8, 64)] == [8, 8, 4, 2, 1]


def trained(folder: Path, ranks: Ranks, policy: Literal["raise", "wait"] = "raise") -> list[int]:
    """Train five steps with a save at step 4. Returns the bytes of the snapshot after each."""
    # Threads share the random numbers, and the ranks must begin with the same weights.
    model = nn.Linear(300, 400)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
    optimizer = torch.optim.AdamW(model.parameters())
    config = CheckpointConfig(
        enable=True, interval=4, async_mode="async_with_pinned_mem", on_low_memory=policy
    )
    sizes = []
    with CheckpointManager(
        folder, model=model, optimizers=optimizer, config=config, ranks=ranks
    ) as manager:
        for step in range(1, 6):
            model(torch.ones(2, 300)).square().mean().backward()
            optimizer.step()
            manager.save(step)
            sizes.append(manager._saver._snapshot.nbytes)
    return sizes


@pytest.fixture
def on_device(fake: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    """Tensors in host memory that count as tensors of a device."""
    monkeypatch.setattr(accelerator, "devices_of", lambda tensors: DEVICES if [*tensors] else ())
    return fake


def test_the_first_save_finds_its_memory(
    on_device: FakeAccelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G13. Method: two ranks on one host hold the same tensors, and write a part of them each.
    After the first step each locks the memory of its own file in a thread; the save locks none."""
    with caplog.at_level(logging.INFO, logger="holdfast"):
        both = run_ranks(2, lambda ranks: trained(tmp_path, ranks), hosts=["node"] * 2)
    nbytes = 3 * 4 * 300 * 400
    for sizes in both:
        assert len({*sizes}) == 1, "reserved once"
    needed = sum(sizes[0] - AHEAD_SPARE_BYTES for sizes in both)
    assert nbytes < needed < nbytes + 200_000
    threads = [call[0] for call in on_device.calls if call[1] == "register"]
    assert threads == ["holdfast-memory"] * 2
    assert "of page-locked host memory for snapshots" in caplog.text
    saved = holdfast.open(tmp_path / "step-4")
    assert torch.isfinite(saved.read("weight")).all()


def test_the_memory_of_all_ranks_on_a_host_is_limited_before_the_save(
    on_device: FakeAccelerator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """G13. Method: a host with memory for one rank of two. Nothing is reserved, and the log says
    so; the first save raises an error, or is made without a snapshot."""
    monkeypatch.setattr(memory, "free_memory", lambda: AHEAD_SPARE_BYTES * 3 // 2)
    waited = run_ranks(2, lambda r: trained(tmp_path, r, "wait"), hosts=["node"] * 2)
    assert "no memory for snapshots is reserved ahead: " in caplog.text
    assert not [call for call in on_device.calls if call[0] == "holdfast-memory"]
    assert waited[0][0] == 0
    assert (tmp_path / "step-4").is_dir()


def test_a_run_in_host_memory_reserves_nothing_ahead(tmp_path: Path) -> None:
    """Method: the same run without an accelerator. The memory is allocated by the first save."""
    (sizes,) = run_ranks(1, lambda ranks: trained(tmp_path, ranks))
    assert sizes[:3] == [0, 0, 0]
    assert sizes[3] > 0


def test_a_snapshot_waits_for_its_reservation(
    fake: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a reservation in the background that takes as long as the test lets it."""
    begun, allowed = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        allowed.wait()

    monkeypatch.setattr(memory, "_touch", slow)
    snapshot = Snapshot()
    snapshot.reserve_ahead(1 << 20, DEVICES, 1)
    begun.wait()
    thread = threading.Thread(target=snapshot.wait)
    thread.start()
    assert thread.is_alive()
    allowed.set()
    thread.join()
    assert [*fake.locked.values()] == [1 << 20]
