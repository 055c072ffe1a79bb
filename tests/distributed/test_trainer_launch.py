"""The launcher: however a run ends, it ends whole, and says why in a line."""

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
    """A run of two workers that has taken its first step and would go on for long."""
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
    """The pids of the launcher's workers."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupt_ends_all_workers_with_a_line(run: subprocess.Popen[str]) -> None:
    """Method: SIGINT to the launcher, as from a terminal; status 130 and no traceback."""
    pids = workers(run)
    assert len(pids) == 2
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert out.count("interrupted at step") == 1
    assert err == ""
    assert not any(map(alive, pids))


def test_a_worker_that_is_killed_ends_the_run_with_its_name(run: subprocess.Popen[str]) -> None:
    """Method: SIGKILL to one worker; the other would wait for it in a collective forever."""
    pids = workers(run)
    os.kill(pids[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGKILL
    assert err.startswith("error: rank 1 of 2 was ended by SIGKILL\n")
    assert "Traceback" not in err
    assert not any(map(alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end workers with their parent")
def test_no_worker_outlives_a_launcher_that_is_killed(run: subprocess.Popen[str]) -> None:
    """Method: SIGKILL to the launcher, which cannot pass it on."""
    pids = workers(run)
    run.kill()
    # Returns once no process holds the pipes; a process that ends closes them a moment before.
    run.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))
