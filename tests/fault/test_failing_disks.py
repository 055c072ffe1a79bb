"""Each system call of a save fails once: all ranks raise, nothing is lost, the run continues."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import CheckpointConfig
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.source import Source
from holdfast.comm import Ranks
from holdfast.errors import HoldfastError, StorageError
from holdfast.format.names import step_name
from holdfast.loading.checkpoint import Checkpoint
from holdfast.manager.context import RunContext
from holdfast.manager.saver import Saver
from holdfast.state.objects import StateTree
from holdfast.storage import renaming
from holdfast.storage.local import LocalStore
from holdfast.testing.failing import FailingStore
from holdfast.testing.ranks import try_ranks

CALLS = {
    "pwritev": errno.ENOSPC,
    "fsync": errno.EIO,
    "open": errno.EROFS,
    "rename_exclusive": errno.EACCES,
}
"""Each call with an error that it meets in life."""

HOMES: dict[str, Any] = {"rename_exclusive": renaming}
"""Modules of calls that are not of `os`."""

SIZE = 2


class FailsOnce:
    """Replaces a function of the system: its k-th call below a folder fails."""

    def __init__(self, name: str, folder: Path, number: int, at: int) -> None:
        self._real: Callable[..., Any] = getattr(HOMES.get(name, os), name)
        self._folder, self._number, self._left = folder, number, at
        self._mutex = threading.Lock()
        self.failed = False

    def __call__(self, first: Any, *arguments: Any, **options: Any) -> Any:
        above = first if isinstance(first, int) else options.get("dir_fd")
        where = os.fspath(first) if above is None else Path(f"/proc/self/fd/{above}").readlink()
        with self._mutex:
            if str(where).startswith(str(self._folder)):
                self._left -= 1
                if self._left == -1:
                    self.failed = True
                    raise OSError(self._number, os.strerror(self._number), where)
        return self._real(first, *arguments, **options)


def state_of(step: int, rank: int) -> dict[str, Any]:
    """Make one tensor that both ranks hold, and one of each rank."""
    value = float(step)
    return {"w": torch.full((70, 3), value), f"rank_{rank}": torch.full((1 << 14,), value)}


def whole_steps(folder: Path) -> list[int]:
    """Return the steps of a folder. Each must be complete, and of one state."""
    store = LocalStore(folder)
    for step, name in Catalog(store).folders().items():
        checkpoint = Checkpoint(Source(store, name, open_manifest(store, name)))
        for tensor in checkpoint.tensors:
            assert torch.unique(checkpoint.read(tensor)).tolist() == [float(step)]
    return Catalog(store).steps()


def save(saver: Saver, step: int, ranks: Ranks) -> HoldfastError | None:
    """Save and wait. Returns the error that this rank raises."""
    leaves = StateTree(state_of(step, ranks.rank)).flatten()
    try:
        saver.save(step, "full", lambda: leaves)
        saver.collect()
        saver.retainer.wait()
    except HoldfastError as error:
        return error
    return None


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize("call", CALLS)
def test_a_failed_system_call_raises_on_every_rank_and_nothing_is_lost(
    call: str, async_mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7, G11. Method: the k-th write meets a full disk, the k-th sync an I/O error, the k-th open
    a read-only file system, the k-th rename a lack of permission, for every k of a replacing save
    and of retention, on either of two ranks. Earlier steps stay complete; if the save fails, both
    ranks raise the same error; the next save works."""
    config = CheckpointConfig(enable=True, keep_latest_k=2, async_mode=async_mode)
    at, failing = 0, True
    while failing:
        folder = tmp_path / str(at)
        folder.mkdir()
        fails = FailsOnce(call, folder, CALLS[call], at)

        def work(ranks: Ranks, folder: Path = folder, fails: FailsOnce = fails) -> Any:
            saver = Saver(RunContext(Catalog(LocalStore(folder)), config, ranks))
            assert [save(saver, step, ranks) for step in (1, 2)] == [None, None]
            ranks.gather(None)
            if ranks.rank == 0:
                monkeypatch.setattr(HOMES.get(call, os), call, fails)
            ranks.broadcast(None)
            told = [save(saver, step, ranks) for step in (2, 3)]
            ranks.gather(None)
            if ranks.rank == 0:
                monkeypatch.undo()
            ranks.broadcast(None)
            there = whole_steps(folder)
            ranks.gather(None)
            return told, there, save(saver, 4, ranks)

        results: list[Any] = try_ranks(SIZE, work)
        assert not [r for r in results if isinstance(r, BaseException)], results
        (told, there, last), (told_too, _, _) = results
        assert [str(error) for error in told] == [str(error) for error in told_too]
        for error in filter(None, told):
            assert isinstance(error, StorageError)
            assert os.strerror(CALLS[call]) in error.what
        assert len([error for error in told if error]) <= 1
        assert 2 in there, "the step that was saved again is the old or the new one"
        assert 3 in there or told[1] is not None
        assert last is None
        assert whole_steps(folder)[-1] == 4
        assert execute(LocalStore(folder), plan_cleanup(LocalStore(folder).list())) == []
        shutil.rmtree(folder)
        at, failing = at + 1, fails.failed
    assert at > 3


def test_a_timeout_and_a_deleted_folder_raise_on_every_rank(tmp_path: Path) -> None:
    """G7, G11. Method: a store whose calls all time out, on one of two ranks; then the folder is
    deleted under the run. Both ranks raise, and the next save works."""
    config = CheckpointConfig(enable=True)

    def work(ranks: Ranks) -> list[HoldfastError | None]:
        late: list[str] = []

        def fail(verb: str, key: str) -> None:
            if late and ranks.rank == 1:
                raise StorageError(f"cannot {verb} `{key}`: Connection timed out")

        saver = Saver(RunContext(Catalog(FailingStore(LocalStore(tmp_path), fail)), config, ranks))
        told = [save(saver, 1, ranks)]
        late.append("from here on")
        told.append(save(saver, 2, ranks))
        late.clear()
        ranks.gather(None)
        if ranks.rank == 0:
            shutil.rmtree(tmp_path)
        ranks.broadcast(None)
        told.append(save(saver, 3, ranks))
        ranks.gather(None)
        if ranks.rank == 0:
            tmp_path.mkdir()
        ranks.broadcast(None)
        return [*told, save(saver, 4, ranks)]

    for told in try_ranks(SIZE, work):
        assert not isinstance(told, BaseException), told
        first, late, gone, last = told
        assert (first, last) == (None, None)
        assert isinstance(late, StorageError)
        assert late.what.startswith("rank 1: cannot create")
        assert isinstance(gone, StorageError)
        assert str(tmp_path) in gone.what
    assert whole_steps(tmp_path) == [4]


def test_errors_after_a_step_is_published_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5, G7. Method: nothing can be deleted; saves continue, and each failure is in the log."""
    monkeypatch.setattr(os, "unlink", FailsOnce("unlink", tmp_path, errno.EBUSY, 0))
    config = CheckpointConfig(enable=True, keep_latest_k=2)
    caplog.set_level(logging.WARNING, "holdfast")

    def work(ranks: Ranks) -> list[HoldfastError | None]:
        saver = Saver(RunContext(Catalog(LocalStore(tmp_path)), config, ranks))
        return [save(saver, step, ranks) for step in range(1, 5)]

    assert try_ranks(SIZE, work) == [[None] * 4] * 2
    assert whole_steps(tmp_path) == [3, 4]
    assert "could not delete `.removing-step-1-" in caplog.text
    assert [name for name in LocalStore(tmp_path).list() if "removing" in name] == []
    assert step_name(4) in {path.name for path in tmp_path.iterdir()}
