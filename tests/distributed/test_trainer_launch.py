"""The launcher ends all its workers, and prints one line about the cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a long run of two workers, and wait for its first step."""
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    command = (
        f"{sys.executable} -m holdfast.trainer.launch --job.dump_folder {tmp_path} "
        f"--training.dataset_path {text} --training.seq_len 32 --training.local_batch_size 1 "
        "--metrics.log_freq 1"
    )
    process = subprocess.Popen(
        command.split(),
        env=os.environ | {"NGPU": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if " step 1 " in line:
            break
    yield process
    process.kill()
    process.wait()


def workers(run: subprocess.Popen[str]) -> list[int]:
    """Return the pids of the launcher's workers."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupt_ends_all_workers_with_one_line(run: subprocess.Popen[str]) -> None:
    """Method: send SIGINT to the launcher, as a terminal does. It ends with status 130 and without
    a traceback."""
    pids = workers(run)
    assert len(pids) == 2
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert out.count("interrupted at step") == 1
    assert err == ""
    assert not any(map(alive, pids))


def test_a_killed_worker_ends_the_run_with_a_message(run: subprocess.Popen[str]) -> None:
    """Method: send SIGKILL to one worker while the other waits for it in a collective."""
    pids = workers(run)
    os.kill(pids[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGKILL
    assert err.startswith("error: rank 1 of 2 was killed by SIGKILL\n")
    assert "Traceback" not in err
    assert not any(map(alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="uses Linux' parent-death signal")
def test_no_worker_outlives_a_killed_launcher(run: subprocess.Popen[str]) -> None:
    """Method: send SIGKILL to the launcher, which cannot forward it."""
    pids = workers(run)
    run.kill()
    # Returns once all processes have closed their pipes, which they do just before they end.
    run.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))
