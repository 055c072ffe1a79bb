"""The reference training run as a user starts it, small enough for a test."""

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
    *("--training.seq_len", "32", "--training.local_batch_size", "2", "--metrics.log_freq", "1"),
    *("--model.flavor", "debugmodel", "--training.dataset_path", "corpus.txt"),
)


def command(*arguments: str, ranks: int, cwd: Path, python: str) -> list[str]:
    """Start `ranks` workers; one rank is a plain process without torchrun."""
    shutil.copy(ROOT / "LICENSE", cwd / "corpus.txt")
    module = "holdfast.trainer.launch" if ranks > 1 else "holdfast.trainer"
    return [python, "-m", module, "--job.config_file", str(CONFIG), *SMALL, *arguments]


def environment(ranks: int) -> dict[str, str]:
    return {**os.environ, "NGPU": str(ranks), "OMP_NUM_THREADS": "1"}


def train(
    *arguments: str, ranks: int = 1, cwd: Path, timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run to the end. stderr and stdout come together, as a terminal shows them."""
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
    """SIGKILL to the launcher and all workers at once, whatever group torchrun put them into."""
    for pid in [run.pid, *_descendants(run.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.wait(30)
    if run.stdout is not None:
        run.stdout.close()


def workers_of(run: subprocess.Popen[str]) -> list[int]:
    """Process ids of the workers, in the order of their ranks."""
    return sorted(_descendants(run.pid))


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        direct = [int(child) for child in children.read_text().split()]
    except OSError:
        return []
    return direct + [below for child in direct for below in _descendants(child)]


def wait_for_step(folder: Path, step: int, *, timeout_s: float = 120) -> None:
    """Return once the run that writes `metrics.jsonl` in `folder` has done `step`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows(folder)):
            return
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} after {timeout_s} s: {rows(folder)[-3:]}")


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged; a line that is being written is left out."""
    file = folder / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step; the last row of a step counts."""
    return {row["step"]: row["loss"] for row in rows(folder)}
