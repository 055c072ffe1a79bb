"""Measure steps lost and seconds to restart after failures of a run with a fast tier:
`python -m benchmarks.restarts`.

Three processes are three hosts, each with a local folder of its own. They train until all are
killed, at the same step or at the same place of the code, and files are lost or changed. Then they
start again. Figures: the steps that were lost, and the seconds from the start of the manager to the
end of its load, on the slowest rank. The page cache is warm.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import machine
from benchmarks.options import RESULTS, silence_warnings
from benchmarks.ranks import run_on_ranks
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.comm import all_ranks
from holdfast.tier.drain import Drain
from holdfast.tier.local import LocalTier

HOSTS = 3
INTERVAL, LOCAL_INTERVAL = 16, 4

LAST_STEP = 30
"""Step after which all processes are killed, unless they die at a place."""

STEP_S = 0.05


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure of a run."""

    name: str
    place: tuple[type, str, str] | None = None
    """Class, method and name of the checkpoint at whose call the processes die."""

    lose: Callable[[Path], object] = lambda _: None
    """Changes the local folders, given the folder that they are in."""


def _lose(*hosts: int) -> Callable[[Path], object]:
    def lose(disks: Path) -> None:
        for number in hosts:
            shutil.rmtree(disks / f"host{number}")

    return lose


def _change_a_byte(disks: Path) -> None:
    """Change a byte in the newest data file of a host."""
    files = sorted(disks.glob("host1/*/step-*/*.distcp"), key=lambda path: path.stat().st_mtime)
    with files[-1].open("r+b") as file:
        file.seek(files[-1].stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


FAILURES = (
    Failure("a process is killed"),
    Failure("all processes are killed, during a save", (LocalTier, "_publish", "step-28")),
    Failure("a host or its disk is lost", lose=_lose(1)),
    Failure("two hosts that follow each other are lost", lose=_lose(1, 2)),
    Failure("all local disks are lost", lose=_lose(0, 1, 2)),
    Failure("a copy to `folder` is killed", (Drain, "_copy_file", "step-32")),
    Failure("a byte on a local disk has changed", lose=_change_a_byte),
)


class State:
    """The state of one rank."""

    def __init__(self, rank: int, nbytes: int) -> None:
        self.rank = rank
        self.tensors = [torch.zeros(nbytes // 32) for _ in range(8)]

    def step(self, step: int) -> None:
        for tensor in self.tensors:
            tensor.fill_(step)

    def state_dict(self) -> dict[str, Any]:
        return {f"rank_{self.rank}": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = state[f"rank_{self.rank}"]


def _manager(root: Path, state: State, replicas: int) -> CheckpointManager:
    ranks: Any = all_ranks()
    ranks.host = f"host{ranks.rank}"
    config = CheckpointConfig(
        enable=True,
        interval=INTERVAL,
        local_interval=LOCAL_INTERVAL,
        local_folder=f"{root}/disks/{{host}}",
        local_replicas=replicas,
    )
    return CheckpointManager(
        root / "run",
        model=torch.nn.Linear(8, 8),
        states={"own": state},
        config=config,
        ranks=ranks,
    )


def train(root: Path, nbytes: int, replicas: int, place: tuple[type, str, str] | None) -> None:
    """Train until all processes die. Writes down the last step of each rank."""
    if place is not None:
        _die_at(*place)
    rank = int(os.environ["RANK"])
    state = State(rank, nbytes)
    with _manager(root, state, replicas) as manager:
        manager.load()
        for step in range(1, 1000):
            state.step(step)
            time.sleep(STEP_S)
            (root / f"step-{rank}").write_text(str(step))
            manager.save(step)
            if step == LAST_STEP - 2:
                _wait_for(root / f"run/step-{INTERVAL}")
            if (step == LAST_STEP and place is None) or step > 200:
                os.kill(os.getpid(), signal.SIGKILL)


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} is not there after 60 s"
        time.sleep(0.01)


def _die_at(owner: type, method: str, name: str) -> None:
    call = getattr(owner, method)

    def called(*args: Any, **more: Any) -> Any:
        if any(getattr(one, "name", None) == name for one in args):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **more)

    setattr(owner, method, called)


def resume(root: Path, nbytes: int, replicas: int) -> tuple[int, float]:
    """Resume. Returns the step and the seconds of the slowest rank. Collective."""
    ranks = all_ranks()
    state = State(ranks.rank, nbytes)
    ranks.all_reduce_max([0.0])
    started = time.perf_counter()
    with _manager(root, state, replicas) as manager:
        step = int(manager.load())
        seconds = time.perf_counter() - started
        assert all((tensor == step).all() for tensor in state.tensors), f"not of step {step}"
        return step, ranks.all_reduce_max([seconds])[0]


def measure(folder: Path, failure: Failure, nbytes: int, replicas: int) -> tuple[int, float]:
    """Fail once. Returns the steps that were lost, and the seconds of the restart."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        (root / "run").mkdir()
        with suppress(RuntimeError):  # All processes are killed.
            run_on_ranks(HOSTS, train, root, nbytes, replicas, failure.place)
        failure.lose(root / "disks")
        step, seconds = run_on_ranks(HOSTS, resume, root, nbytes, replicas)
        reached = max(int((root / f"step-{rank}").read_text()) for rank in range(HOSTS))
        return reached - step, seconds


def table(found: Mapping[tuple[str, int], Sequence[tuple[int, float]]]) -> list[str]:
    """Lines of the table: medians, with and without local replicas."""
    lines = ["| failure | steps lost | seconds | with `local_replicas = 1`: steps lost | seconds |"]
    lines += ["|---|---|---|---|---|"]
    for failure in FAILURES:
        cells = [failure.name]
        for replicas in (0, 1):
            runs = found[failure.name, replicas]
            lost = sorted({steps for steps, _ in runs})
            cells += [
                str(lost[0]) if len(lost) == 1 else f"{lost[0]} to {lost[-1]}",
                f"{statistics.median(seconds for _, seconds in runs):.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure every failure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=200, help="MB of state of each rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="on the disk measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "restarts.md")
    options = parser.parse_args()
    silence_warnings()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for _ in range(options.rounds):
        for failure in FAILURES:
            for replicas in (0, 1):
                figures = measure(folder, failure, options.mb * 10**6, replicas)
                found.setdefault((failure.name, replicas), []).append(figures)
    head = (
        f"{machine()}; {HOSTS} processes as hosts, {options.mb} MB of state each; `interval` "
        f"{INTERVAL}, `local_interval` {LOCAL_INTERVAL}; killed after step {LAST_STEP}, or at the "
        f"failure. Medians of {options.rounds}."
    )
    options.out.write_text("\n".join([head, "", *table(found)]) + "\n")


if __name__ == "__main__":
    main()
