"""Programs that do not look: no `close`, no next call, an interrupt, a folder that was moved."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast import CheckpointConfig, CheckpointManager
from holdfast.errors import ExistsError, StorageError

SETTINGS: dict[str, Any] = {"enable": True, "interval": 1, "last_save_model_only": False}


def manager(folder: Path, value: float = 1, **settings: Any) -> CheckpointManager:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, value)
    return CheckpointManager(folder, model=model, config=CheckpointConfig(**(SETTINGS | settings)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


UNCLOSED = """
import resource, signal, sys, torch, holdfast
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = holdfast.CheckpointConfig(enable=True, interval=1, async_mode="async")
model = torch.nn.Linear(1000, 1000)
manager = holdfast.CheckpointManager(sys.argv[1], model=model, config=config)
manager.save(1)
manager.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
manager.save(2)
"""


def test_a_program_that_ends_without_close_is_told_of_a_failed_save(tmp_path: Path) -> None:
    """G7. Method: a file that may not grow under a save in the background, after which the program
    ends. Nothing else is printed: the interpreter takes the manager apart in silence."""
    command = [sys.executable, "-c", UNCLOSED, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert ran.stderr.startswith("step 2 was not saved: cannot write `"), ran.stderr
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr
    assert "step-1" in names(tmp_path)


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_threads_save_one_after_the_other(mode: str, tmp_path: Path) -> None:
    """Method: three threads with ten steps each, at once."""
    with (
        manager(tmp_path, async_mode=mode, keep_latest_k=0) as held,
        ThreadPoolExecutor(3) as threads,
    ):
        saved = [*threads.map(held.save, range(1, 31))]
    assert saved == [True] * 30
    assert len([*tmp_path.glob("step-*")]) == 30


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_an_interrupt_before_the_thread_starts_leaves_a_working_manager(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7. Method: KeyboardInterrupt in the start of the thread that writes."""
    with manager(tmp_path, async_mode=mode) as held:
        held.save(1)
        held.wait()

        def interrupted(thread: threading.Thread) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                held.save(2)
        held.wait_for_staging()
        assert names(tmp_path) == [".lock", "step-1"]
        assert held.save(3)
    assert names(tmp_path) == [".lock", "step-1", "step-3"]


def test_a_signal_after_the_last_save_is_passed_on(tmp_path: Path) -> None:
    """G12. Method: it comes when no further save would see it."""
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        with manager(tmp_path, stop_signals=("SIGUSR1",)) as held:
            held.save(1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not received
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_run_whose_folder_was_moved_saves_nothing_into_the_next_ones(tmp_path: Path) -> None:
    """G16. Method: the folder moved away, or its lock removed, under a run; another run starts in
    its place, and keeps every checkpoint."""
    folder = tmp_path / "run"
    for lose in (
        lambda: folder.rename(tmp_path / "moved"),
        lambda: (folder / ".lock").unlink(),
    ):
        first = manager(folder, 7)
        first.save(1)
        lose()
        second = manager(folder, 1, keep_latest_k=2)
        for step in (1, 2, 3):
            second.save(step)
        kept = [*folder.glob("step-*")]
        for step in (3, 4):
            with pytest.raises(ExistsError, match="this run has lost its folder"):
                first.save(step)
        assert [*folder.glob("step-*")] == kept
        second.close()
        first.close()
        assert torch.equal(manager_weight(folder), torch.ones(1, 1))


def manager_weight(folder: Path) -> torch.Tensor:
    """Weight in the newest checkpoint of a folder."""
    model = nn.Linear(1, 1)
    with CheckpointManager(folder, model=model, config=CheckpointConfig(**SETTINGS)) as held:
        assert held.load() == 3
    return model.weight.detach()


def test_a_run_whose_lock_was_removed_takes_it_again(tmp_path: Path) -> None:
    """G16. Method: nobody else has come; another start is kept out afterwards."""
    with manager(tmp_path) as first:
        (tmp_path / ".lock").unlink()
        assert first.save(1)
        with pytest.raises(ExistsError, match="is held by this process already"):
            manager(tmp_path)


def test_a_run_whose_folder_was_deleted_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with manager(folder) as held:
        folder.rename(tmp_path / "moved")
        with pytest.raises(StorageError, match="run"):
            held.save(1)


def test_a_run_that_saves_below_another_ones_steps_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Method: a new run in an old folder, without `load`; said once, and not after a `load`."""
    with manager(tmp_path, keep_latest_k=0) as old:
        old.save(20)
        old.save(30)
    with caplog.at_level(logging.WARNING, "holdfast"), manager(tmp_path, keep_latest_k=0) as new:
        new.save(1)
        new.save(2)
    assert caplog.text.count("is saved beside 2 newer checkpoints, up to step 30") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, "holdfast"), manager(tmp_path, keep_latest_k=0) as new:
        assert new.load() == 30
        new.save(31)
    assert not caplog.text
