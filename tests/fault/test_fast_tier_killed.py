"""SIGKILL of the processes of a run with a fast tier, at chosen places of its saves, copies and
deletions."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import holdfast
from extent import some
from fast_tier import State
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.comm import all_ranks
from holdfast.format.names import HiddenFolder
from holdfast.saving.remove import Remover
from holdfast.storage.local import LocalStore
from holdfast.tier.drain import Drain
from holdfast.tier.local import LocalTier
from processes import Job, run_processes


@dataclass(frozen=True, slots=True)
class Place:
    """A place at which a process is killed: before a call, or after it."""

    rank: int
    owner: type
    method: str
    is_here: Callable[..., bool]
    """Whether a call is the one, given its arguments."""

    after: bool = False


def of_step(step: int) -> Callable[..., bool]:
    """Calls with the attempt of a step among their arguments."""
    return lambda *args: any(getattr(one, "name", None) == f"step-{step}" for one in args)


def in_the_folder(catalog: Catalog, attempt: HiddenFolder) -> bool:
    return "/disks/" not in catalog.store.url and attempt.name == "step-8"


def without_step_2(remover: Remover) -> bool:
    names = remover._catalog.store.list()
    return "step-6/" in names and "step-2/" not in names


PLACES = {
    "one host has published a step": Place(1, LocalTier, "_publish", of_step(6)),
    "a file is being copied": Place(1, Drain, "_copy_file", of_step(8)),
    "an old step has lost its name": Place(0, Remover, "start", without_step_2),
    "no index is on any host": Place(0, LocalTier, "_write_index", of_step(6)),
    "all files are on the hosts": Place(1, LocalTier, "_write_index", of_step(6), after=True),
    "a copy has all its files": Place(0, Catalog, "publish", in_the_folder),
    "a copy is published": Place(0, Catalog, "publish", in_the_folder, after=True),
    "files of an old step are being deleted": Place(
        1, LocalStore, "remove", lambda _, key: key.startswith(".removing-")
    ),
}


def die_at(place: Place, rank: int) -> None:
    """Have this process killed at a place, if it is the one."""
    call = getattr(place.owner, place.method)

    def called(*args: Any, **more: Any) -> Any:
        is_here = place.is_here(*args)
        if is_here and not place.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **more)
        if is_here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    if rank == place.rank:
        setattr(place.owner, place.method, called)


def manager_of(rank: int, root: Path, state: State, replicas: int) -> CheckpointManager:
    """The manager of a rank, on a host of its own."""
    ranks: Any = all_ranks()
    ranks.host = f"node{rank}"
    config = CheckpointConfig(
        enable=True,
        interval=4,
        local_interval=2,
        local_folder=f"{root}/disks/{{host}}",
        local_replicas=replicas,
    )
    model, states = state.model, {"own": state}
    return CheckpointManager(root / "run", model=model, states=states, config=config, ranks=ranks)


def train(rank: int, size: int, root: Path, place: str, replicas: int) -> None:
    """Train until a process is killed. Writes down each step that is saved."""
    die_at(PLACES[place], rank)
    state = State(rank)
    with manager_of(rank, root, state, replicas) as manager:
        for step in range(1, 200):
            state.step(step)
            if manager.save(step):
                # Renamed, since the process may be killed at any moment.
                (root / f"saving-{rank}").write_text(str(step))
                (root / f"saving-{rank}").replace(root / f"saved-{rank}")


def resume(rank: int, size: int, root: Path, replicas: int) -> tuple[int, float]:
    """Resume. Returns the step, and the seconds from the start of the manager to the end of the
    load."""
    state, started = State(rank), time.perf_counter()
    with manager_of(rank, root, state, replicas) as manager:
        step = int(manager.load())
        state.check(step)
        return step, time.perf_counter() - started


@pytest.mark.parametrize(
    ("place", "replicas"), some([(place, number % 2) for number, place in enumerate(PLACES)], 3)
)
def test_a_run_that_is_killed_resumes_from_its_hosts(
    place: str, replicas: int, tmp_path: Path
) -> None:
    """G18, G1. Method: two processes, each with a disk of its own. One is killed at a place, and
    then the other, as a launcher does. The restart resumes from a step that is not older than the
    newest that both have saved, with the state of that step on both; every checkpoint in the folder
    of the run is whole, and nothing is left of the killed run."""
    (tmp_path / "run").mkdir()
    with Job(2, train, tmp_path, place, replicas) as job:
        deadline = time.monotonic() + 60
        while -signal.SIGKILL not in job.statuses() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert -signal.SIGKILL in job.statuses(), "no process came to the place"
        job.kill(range(2))
        job.wait(30)
    saved = [int((tmp_path / f"saved-{rank}").read_text()) for rank in range(2)]
    found = run_processes(2, resume, tmp_path, replicas)
    (step,) = {step for step, _ in found}
    assert step >= min(saved) > 0
    for path in (tmp_path / "run").glob("step-*"):
        rows = holdfast.open(path).read("weight")
        assert (rows == float(path.name.removeprefix("step-"))).all()
    hidden = [*tmp_path.rglob(".attempt-*"), *tmp_path.rglob(".removing-*")]
    assert hidden == []
