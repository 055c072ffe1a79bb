"""Signals to real runs of several ranks."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from extent import some
from processes import Job
from runs import kill_all, start, train, wait_for_step, workers_of

LONG = ("--training.steps", "500", "--checkpoint.interval", "400")


@pytest.mark.parametrize("victim", some(["launcher", "one worker"], 1))
def test_a_signal_saves_one_step_and_ends_all_ranks(tmp_path: Path, victim: str) -> None:
    """G12. Method: SIGTERM to the launcher, or to one of two workers; the next start resumes from
    the saved step."""
    run = start(*LONG, ranks=2, cwd=tmp_path)
    wait_for_step(tmp_path / "outputs", 3)
    os.kill(run.pid if victim == "launcher" else workers_of(run)[1], signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 143, said
    assert "Traceback" not in said
    (step,) = (tmp_path / "outputs/checkpoint").glob("step-*")
    assert f"SIGTERM: saving step {step.name.removeprefix('step-')}, then ending" in said
    number = int(step.name.removeprefix("step-"))
    more = train("--training.steps", str(number + 1), ranks=2, cwd=tmp_path)
    assert more.returncode == 0, more.stdout
    assert f"resumed from step {number}" in more.stdout


def step_for_ever(rank: int, size: int, folder: Path) -> None:
    """Run steps of random length: each waits for data and has collectives, every third saves, and
    some evaluate without a call of `save`."""
    module: Any = nn.Module()
    module.register_buffer("stamp", torch.zeros(1 << 20))
    config = holdfast.CheckpointConfig(enable=True, interval=3, keep_latest_k=2)
    wait = random.Random(rank)
    with holdfast.CheckpointManager(folder, model=module, config=config) as manager:
        step = manager.load()
        (folder / f"ready-{rank}").touch()
        while True:
            time.sleep(wait.uniform(0, 0.004) if step % 5 else 0.03)
            step += 1
            module.stamp.fill_(step)
            manager.save(step)


def signal_again_and_again(folder: Path, *, size: int, times: int, seed: int) -> None:
    """Signal one rank repeatedly: all ranks end with the exit status of the signal, and the newest
    checkpoint is new, complete, and of one step."""
    choose = random.Random(seed)
    newest = 0
    for _ in range(times):
        for path in folder.glob("ready-*"):
            path.unlink()
        number = choose.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        with Job(size, step_for_ever, folder) as job:
            while len(list(folder.glob("ready-*"))) < size:
                time.sleep(0.005)
            time.sleep(choose.uniform(0, 0.15))
            job.signal([choose.randrange(size)], number)
            job.wait(60)
            assert job.statuses() == [128 + number] * size
        found = max(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
        assert found > newest
        newest = found
        stamp = holdfast.open(folder / f"step-{newest}").read("stamp")
        assert torch.unique(stamp).tolist() == [float(newest)]


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_to_any_rank_at_any_moment_saves_one_step(size: int, tmp_path: Path) -> None:
    """G12. Method: a signal during a wait for data, a step, an evaluation, or a save."""
    signal_again_and_again(tmp_path, size=size, times=5, seed=size)


def test_a_worker_of_torchrun_ends_with_a_status_that_is_not_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G12. Method: a signal in an environment as `torchrun` makes it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    model = nn.Linear(3, 3)
    config = holdfast.CheckpointConfig(enable=True, interval=100)
    with (
        pytest.raises(SystemExit) as ended,
        holdfast.CheckpointManager(tmp_path, model=model, config=config) as manager,
    ):
        signal.raise_signal(signal.SIGUSR1)
        manager.save(1)
    assert ended.value.code == 0
    assert (tmp_path / "step-1").is_dir()


STEPS = """
import os, sys, time, torch, holdfast, torch.distributed as dist
dist.init_process_group("gloo")
config = holdfast.CheckpointConfig(enable=True, interval=1000)
with holdfast.CheckpointManager("steps", model=torch.nn.Linear(3, 3), config=config) as manager:
    step = manager.load()
    open(f"started-{os.environ['RANK']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w").close()
    while True:
        time.sleep(0.01)
        step += 1
        manager.save(step)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", ["launcher", "worker"])
def test_one_signal_ends_a_job_of_two_launchers_that_restart_workers(
    tmp_path: Path, victim: str
) -> None:
    """G12. Method: two `torchrun --max-restarts 3` on this machine; SIGTERM to one of them, or
    SIGUSR1 to a worker. Both end, and no worker was started again."""
    (tmp_path / "steps.py").write_text(STEPS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command += ["--rdzv-id=job", "--local-addr=127.0.0.1", "steps.py"]
    launchers = [subprocess.Popen(command, cwd=tmp_path, text=True) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while len([*tmp_path.glob("started-*")]) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        if victim == "launcher":
            launchers[1].send_signal(signal.SIGTERM)
        else:
            os.kill(workers_of(launchers[1])[-1], signal.SIGUSR1)
        statuses = [launcher.wait(400) for launcher in launchers]
    finally:
        for launcher in launchers:
            kill_all(launcher)
    assert statuses[0] == 0
    assert (statuses[1] == 0) == (victim == "worker")
    assert sorted(path.name for path in tmp_path.glob("started-*")) == [
        "started-0-0",
        "started-1-0",
    ]
    assert len([*(tmp_path / "steps").glob("step-*")]) == 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_hundred_signals_save_one_step_each(size: int, tmp_path: Path) -> None:
    """G12. Method: as above, a hundred times."""
    signal_again_and_again(tmp_path, size=size, times=100, seed=50 + size)
