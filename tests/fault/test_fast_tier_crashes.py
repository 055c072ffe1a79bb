"""Runs with a fast tier that are killed at each of their writes."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import holdfast
from extent import EVERYTHING
from fast_tier import Run, State
from holdfast import CheckpointManager
from holdfast.storage.local import LocalStore
from holdfast.storage.store import FileWriter

HOSTS = ["node0", "node1"]


class Crash:
    """Counts the changes that stores make, and makes all of them fail from number `at` on, as if
    every process had been killed there: nothing cleans up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at = 0, 1 << 60
        self._mutex = threading.Lock()
        for name in ("make_folder", "sync", "publish", "unpublish", "remove"):
            monkeypatch.setattr(LocalStore, name, self._counted(getattr(LocalStore, name)))
        create = LocalStore.create

        @contextmanager
        def created(store: LocalStore, key: str, nbytes: int) -> Any:
            self.check()
            with create(store, key, nbytes) as writer:
                yield _Writer(writer, self)
            self.check()

        monkeypatch.setattr(LocalStore, "create", created)

    def check(self) -> None:
        """Count one change."""
        with self._mutex:
            self.count += 1
            if self.count > self.at:
                raise holdfast.StorageError("the process is dead")

    def _counted(self, change: Any) -> Any:
        def counted(store: LocalStore, *names: str, **more: bool) -> Any:
            self.check()
            return change(store, *names, **more)

        return counted


class _Writer:
    def __init__(self, beneath: FileWriter, crash: Crash) -> None:
        self._beneath, self._crash = beneath, crash

    def write(self, offset: int, parts: Any) -> None:
        self._crash.check()
        self._beneath.write(offset, parts)


def saved_before(run: Run) -> int:
    """Train four steps. Returns the newest step that `save` has saved on all ranks."""
    saved = [0, 0]

    def loop(manager: CheckpointManager, state: State, resumed: int) -> None:
        for step in range(resumed + 1, 5):
            state.step(step)
            if manager.save(step):
                saved[state.rank] = step

    with suppress(holdfast.HoldfastError):
        run.each(loop)
    return min(saved)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("replicas", [0, 1])
def test_a_run_resumes_after_a_crash_at_any_write(
    tmp_path: Path, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G18, G2. Method: two hosts save each step, and copy every second one. They are killed at
    each change that any of them makes on any disk; by default at some of these. The next start
    resumes from a step that is not older than the newest that was saved, and all of its state is of
    that step."""
    crash = Crash(monkeypatch)
    settings = {"interval": 2, "local_interval": 1, "local_replicas": replicas}
    assert saved_before(Run(tmp_path / "whole", HOSTS, **settings)) == 4
    num_changes = crash.count
    assert num_changes > 100
    stride = 1 if EVERYTHING else 61
    for at in range(replicas, num_changes, stride):
        run = Run(tmp_path / str(at), HOSTS, **settings)
        crash.count, crash.at = 0, at
        saved = saved_before(run)
        crash.at = 1 << 60
        assert run.resumes_from() >= saved
        assert not [*run.root.rglob(".attempt-*")]
