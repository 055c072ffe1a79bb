"""Forked children of a run: they keep no lock of it, end nothing of it, and do not delay its
end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from extent import every, some
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.manager import lifetime
from holdfast.storage.local import LocalStore

SOON_S = 20.0
"""Far below the life of the children here, far above what anything takes."""


def manager(folder: Path, **settings: Any) -> CheckpointManager:
    config = CheckpointConfig(enable=True, **({"interval": 1} | settings))
    return CheckpointManager(folder, model=nn.Linear(3, 3), config=config)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """Fork a process that does `work`, then lives until the context ends."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os.write(writing, bytes([status]))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
            os._exit(status)
    try:
        os.close(writing)
        assert os.read(reading, 1) == b"\0", "the work of the child failed"
        yield pid
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_closing_a_manager_does_not_wait_for_children(tmp_path: Path) -> None:
    """G17. Method: a child outlives the context; the folder is unlocked at once, and the signal
    handlers are restored."""
    started, before = time.monotonic(), signal.getsignal(signal.SIGTERM)
    with manager(tmp_path) as held:
        children = child(lambda: None)
        children.__enter__()
        held.save(1)
    try:
        assert time.monotonic() - started < SOON_S
        assert signal.getsignal(signal.SIGTERM) == before
        with manager(tmp_path) as again:
            assert again.load() == 1
    finally:
        children.__exit__(None, None, None)


def test_an_inherited_manager_does_nothing(tmp_path: Path) -> None:
    """G17. Method: a child saves, loads, waits, closes, and leaves the context of its parent's
    manager. The parent's lock, note, signals and checkpoints are unchanged."""
    with manager(tmp_path) as held:
        held.save(1)
        note = (tmp_path / ".lock").read_text()

        def work() -> None:
            for call in (lambda: held.save(2), held.load, held.save_seed):
                with pytest.raises(holdfast.UsageError, match="was forked from it"):
                    call()
            held.wait_for_staging()
            held.wait()
            held.close()
            held.__exit__(None, None, None)
            held.__exit__(SystemExit, SystemExit(0), None)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

        with child(work):
            assert (tmp_path / ".lock").read_text() == note
            assert f"pid {os.getpid()}" in note
            with pytest.raises(holdfast.ExistsError, match="held by this process already"):
                manager(tmp_path)
            assert held.save(2)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(SystemExit):
                held.save(3)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-1", "step-2", "step-3"]


RUN = """
import multiprocessing, os, sys, time, torch
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.manager import lifetime
from holdfast.storage.local import LocalStore
config = CheckpointConfig(enable=True, interval=1)
how, folder = sys.argv[1:]
model = torch.nn.Linear(3, 3)
with CheckpointManager(folder, model=model, config=config) as manager:
    if how == "loader":
        # Workers that a loader keeps, and whose parent dies before it can stop them.
        data = torch.utils.data.TensorDataset(torch.zeros(64, 3))
        loader = torch.utils.data.DataLoader(data, num_workers=2, persistent_workers=True)
        next(iter(loader))
    elif how == "fork":
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
    else:
        multiprocessing.set_start_method(how)
        multiprocessing.Process(target=time.sleep, args=(600,), daemon=True).start()
    step = manager.load()
    while True:
        step += 1
        manager.save(step)
        print(step, flush=True)
        time.sleep(0.01)
"""


@contextmanager
def running(how: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run with children, and wait for its first step. Kill its session at the end.

    It starts afresh: a signal to a warm `python` reaches the run later, and not its children.
    """
    command = [sys.executable, "-c", RUN, how, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", some(["loader", "fork"], 1))
def test_a_signal_ends_a_run_that_has_children(how: str, tmp_path: Path) -> None:
    """G12, G17. Method: SIGTERM to the run only, whose children live on."""
    with running(how, tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(SOON_S) == 128 + signal.SIGTERM


@pytest.mark.parametrize("how", every(2, ["fork", "loader", "forkserver", "spawn"]))
def test_children_of_a_killed_run_do_not_block_the_next_start(how: str, tmp_path: Path) -> None:
    """G17. Method: SIGKILL to the run only; its children live on while the next one saves."""
    with running(how, tmp_path) as process:
        process.kill()
        assert process.wait(SOON_S) == -signal.SIGKILL
        with manager(tmp_path) as held:
            step = held.load()
            assert step >= 1
            assert held.save(step + 1)


def test_managers_that_end_in_another_order_restore_the_signal_handlers(tmp_path: Path) -> None:
    """G17. Method: two managers of two folders; the first one ends first. A signal then ends the
    process as it did before."""
    ends: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: ends.append(number))
    try:
        first, second = (manager(tmp_path / name) for name in ("a", "b"))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(SystemExit):
            second.save(1)
        second.__exit__(None, None, None)
        assert ends == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ends == [signal.SIGUSR1]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_closed_manager_refuses_to_save_and_load(tmp_path: Path) -> None:
    """G16. Method: closed by `close`, by the end of its context, and by an error in it; every call
    that would change the folder or the state. Checkpoints of the next manager are unchanged."""
    held = manager(tmp_path, keep_latest_k=2)
    held.save(1)
    held.close()
    held.close()
    held.wait()
    assert held.final_step() is None
    with manager(tmp_path, keep_latest_k=2) as second:
        second.save(2)
    with pytest.raises(KeyError), manager(tmp_path) as third:
        raise KeyError
    before = names(tmp_path)
    for closed in (held, second, third):
        for call in (partial(closed.save, 9), closed.load, closed.save_seed, closed.__enter__):
            with pytest.raises(holdfast.UsageError, match="is closed"):
                call()
    assert names(tmp_path) == before


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_manager_without_references_releases_its_folder(mode: str, tmp_path: Path) -> None:
    """G16. Method: its variable is deleted or reassigned, as in a notebook, without `close`. In one
    of the modes, a hook of the optimizer refers to the manager."""

    def made() -> CheckpointManager:
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters())
        config = CheckpointConfig(enable=True, interval=1, async_mode=mode)  # type: ignore[arg-type]
        return CheckpointManager(tmp_path, model=model, optimizers=optimizer, config=config)

    held = made()
    held.save(1)
    held.wait()
    with pytest.raises(holdfast.ExistsError, match="held by this process already"):
        made()
    del held
    made().close()


def test_a_manager_that_failed_to_start_releases_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G16. Method: the cleanup fails after the folder was locked; the error is kept, and with it
    the frames that refer to the manager."""

    def fail(_: object) -> None:
        raise holdfast.StorageError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(lifetime, "put_in_order", fail)
        with pytest.raises(holdfast.StorageError, match="gone") as kept:
            manager(tmp_path)
    manager(tmp_path).close()
    assert kept.value.what == "gone"


def test_a_process_forked_while_a_lock_is_taken_does_not_keep_it(tmp_path: Path) -> None:
    """G17. Method: threads that take and release locks, and forks in between, many times. Once the
    parent holds none, none is held, whichever children live."""
    store = LocalStore(tmp_path)
    stop = threading.Event()

    def lock_again_and_again(number: int) -> None:
        while not stop.is_set():
            with store.lock(f"lock-{number}", "mine"):
                pass

    threads = [threading.Thread(target=lock_again_and_again, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    pids = []
    for _ in range(30):
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        pids.append(pid)
    stop.set()
    for thread in threads:
        thread.join()
    try:
        for number in range(3):
            with store.lock(f"lock-{number}", "mine"):
                pass
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_parent_and_child_can_save_at_the_same_time(tmp_path: Path) -> None:
    """G16. Method: parent and child save to different paths, then to one path."""
    state = {"w": torch.ones(100)}

    def work() -> None:
        torch.set_num_threads(1)
        holdfast.save(tmp_path / "child", state)
        with pytest.raises(holdfast.ExistsError):
            holdfast.save(tmp_path / "parent", state)

    holdfast.save(tmp_path / "parent", state)
    with child(work):
        assert names(tmp_path) == ["child", "parent"]
