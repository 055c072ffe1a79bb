"""Signals and failing saves, in one process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.manager.policy import kind_in_time
from holdfast.manager.signals import REPEATED_S


def manager(folder: Path, **settings: Any) -> CheckpointManager:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    config = CheckpointConfig(enable=True, **({"interval": 100} | settings))
    return CheckpointManager(folder, model=model, optimizers=optimizer, config=config)


def me(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_the_next_step_and_ends_the_run(tmp_path: Path, name: str) -> None:
    """G12: whatever the interval; the status says which signal it was, the step is full."""
    with pytest.raises(SystemExit) as ended, manager(tmp_path) as held:
        held.save(1)
        me(signal.Signals[name])
        held.save(2)
    assert ended.value.code == 128 + signal.Signals[name]
    assert names(tmp_path) == ["step-2"]
    assert holdfast.open(tmp_path / "step-2").manifest.kind == "full"


STUCK = """
import ctypes, sys, torch
from holdfast import CheckpointConfig, CheckpointManager
config = CheckpointConfig(enable=True, interval=1)
with CheckpointManager(sys.argv[1], model=torch.nn.Linear(3, 3), config=config) as manager:
    manager.save(1)
    print("saved", flush=True)
    while True:
        ctypes.CDLL(None).sleep(600)
"""


def test_a_second_signal_ends_the_process_at_once_with_the_last_step_intact(tmp_path: Path) -> None:
    """G12. Method: a real process whose main thread waits in native code and runs no Python. A
    signal that comes twice within a second is one, as where a launcher passes on what its whole
    group has got."""
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"saved\n"
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.1)
        assert process.poll() is None
        time.sleep(REPEATED_S)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert holdfast.open(tmp_path / "step-1").read("weight").shape == (3, 3)


def sleep_for_long(ready: Any) -> None:
    ready.set()
    time.sleep(60)


def test_a_signal_to_a_process_forked_off_is_its_own(tmp_path: Path) -> None:
    """G12. Method: a child, such as one that loads data, ended by SIGTERM: it dies of it, and the
    run goes on."""
    with manager(tmp_path, interval=1) as held:
        forking = multiprocessing.get_context("fork")
        ready = forking.Event()
        child = forking.Process(target=sleep_for_long, args=(ready,))
        child.start()
        assert ready.wait(30)
        child.terminate()
        child.join(30)
        assert child.exitcode == -signal.SIGTERM
        assert held.save(1)
    assert names(tmp_path) == ["step-1"]


def test_the_signals_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with manager(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with manager(tmp_path, load_only=True):
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_deadline_too_near_for_a_save_leaves_the_newest_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G12: a save is known to take longer than is left, so none is begun, which the log says."""
    with (
        caplog.at_level(logging.WARNING, "holdfast"),
        pytest.raises(SystemExit),
        manager(tmp_path, interval=1, stop_deadline_s=1e-9) as held,
    ):
        held.save(1)
        me(signal.SIGTERM)
        held.save(2)
    assert names(tmp_path) == ["step-1"]
    assert "saving nothing: the newest checkpoint remains, then ending" in caplog.text


@given(left=st.floats(-10, 100), save=st.floats(0, 100), share=st.floats(0, 1))
def test_what_is_saved_before_a_deadline_fits_before_it(
    left: float, save: float, share: float
) -> None:
    """G12: by what has been measured; more is never left out for less."""
    kind = kind_in_time(left, save, share)
    if kind == "full":
        assert save < left
    elif kind == "model":
        assert save * share < left <= save
    else:
        assert left <= save * share


def test_a_signal_with_the_last_step_ends_the_run_as_usual(tmp_path: Path) -> None:
    with manager(tmp_path) as held:
        me(signal.SIGTERM)
        assert held.save(2, last_step=True)
    assert names(tmp_path) == ["step-2"]


def test_a_signal_that_cannot_be_waited_for_is_refused() -> None:
    for name in ("SIGKILL", "SIGNONSENSE", "signal"):
        with pytest.raises(holdfast.UsageError, match=name):
            CheckpointConfig(stop_signals=(name,))


def test_a_failed_save_ends_the_run_or_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G11: the folder is removed under the run. By default that is raised; with `warn` the run goes
    on, and the next save works."""
    folder = tmp_path / "run"
    with manager(folder, interval=1) as held:
        shutil.rmtree(folder)
        with pytest.raises(holdfast.StorageError, match="run"):
            held.save(1)
    with (
        caplog.at_level(logging.WARNING, "holdfast"),
        manager(folder, interval=1, on_save_error="warn") as held,
    ):
        shutil.rmtree(folder)
        assert not held.save(1)
        folder.mkdir()
        assert held.save(2)
    assert "a save failed, the run goes on" in caplog.text
    assert names(folder) == ["step-2"]
