"""The reference training run, started like a user does, with a small model and data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import warm

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "train_configs" / "debug_model.toml"
SMALL = (
    "--training.seq_len",
    "32",
    "--metrics.log_freq",
    "1",
    "--model.flavor",
    "debugmodel",
    "--training.dataset_path",
    "corpus.txt",
)


def command(*arguments: str, ranks: int, cwd: Path, python: str) -> list[str]:
    """Return the command of a run with `ranks` workers; a single one is started without the
    launcher."""
    shutil.copy(ROOT / "LICENSE", cwd / "corpus.txt")
    module = "holdfast.trainer.launch" if ranks > 1 else "holdfast.trainer"
    # A single worker takes its share of the batch in half as many passes.
    batch = ("--training.local_batch_size", "4" if ranks == 1 else "2")
    return [python, "-m", module, "--job.config_file", str(CONFIG), *SMALL, *batch, *arguments]


def environment(ranks: int) -> dict[str, str]:
    return {**os.environ, "NGPU": str(ranks), "OMP_NUM_THREADS": "1"}


def train(
    *arguments: str, ranks: int = 1, cwd: Path, timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run until the end. The result has stdout and stderr in one text, as on a terminal."""
    run = start(*arguments, ranks=ranks, cwd=cwd, python=warm.python())
    try:
        said, _ = run.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_all(run)
        raise
    return subprocess.CompletedProcess(run.args, run.returncode, said)


def start(
    *arguments: str, ranks: int, cwd: Path, python: str = sys.executable
) -> subprocess.Popen[str]:
    """Start a run in a process group of its own."""
    return subprocess.Popen(
        command(*arguments, ranks=ranks, cwd=cwd, python=python),
        cwd=cwd,
        env=environment(ranks),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill_all(run: subprocess.Popen[str]) -> None:
    """Send SIGKILL to the launcher and all its descendants, whatever process groups they are in."""
    for pid in [run.pid, *_descendants(run.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.wait(30)
    if run.stdout is not None:
        run.stdout.close()


def workers_of(run: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of the workers in the order of their ranks."""
    return sorted(_descendants(run.pid))


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        direct = [int(child) for child in children.read_text().split()]
    except OSError:
        return []
    return direct + [below for child in direct for below in _descendants(child)]


def wait_for_step(folder: Path, step: int, *, timeout_s: float = 120) -> None:
    """Wait until the run that writes `metrics.jsonl` in `folder` has reached `step`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows(folder)):
            return
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} after {timeout_s} s: {rows(folder)[-3:]}")


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.jsonl`, without a line that is being written."""
    file = folder / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of each step: that of its last row, if a step was repeated."""
    return {row["step"]: row["loss"] for row in rows(folder)}
