"""Syncs in the background, and the deletions that wait for them."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest

import holdfast
from holdfast.comm import Ranks
from holdfast.errors import StorageError
from holdfast.hosts import sealing
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.sealing import sealed_by_all
from holdfast.testing.ranks import run_ranks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail() -> None:
    raise OSError(5, "Input/output error")


def save(path: Path, background: BackgroundSync) -> None:
    def work(ranks: Ranks) -> None:
        with sealed_by_all(str(path), ranks=ranks, publishes=True, background=background) as folder:
            (folder / "weights").write_text(path.name)

    run_ranks(1, work)


def test_a_deletion_waits_for_the_syncs_before_it() -> None:
    """G2. Method: a sync that takes as long as we want."""
    background, may_end, done = BackgroundSync(), threading.Event(), []

    def sync() -> None:
        may_end.wait()
        done.append("synced")

    background.sync("new", sync)
    background.delete("old", lambda: done.append("deleted"))
    assert done == []
    may_end.set()
    background.wait()
    assert done == ["synced", "deleted"]


def test_a_failed_sync_is_raised_and_costs_no_older_checkpoint() -> None:
    background, deleted = BackgroundSync(), []
    background.note_durable("root")
    background.sync("new", fail)
    background.delete("old", lambda: deleted.append("old"))
    with pytest.raises(StorageError, match="`new` was saved, but could not be made durable"):
        background.wait()
    assert deleted == []
    assert not background.may_follow("root"), "the next save must be durable at return"
    background.wait()


def test_the_next_save_raises_the_error_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7. The first save of a process is durable at return; the sync of the second fails."""
    background = BackgroundSync()
    save(tmp_path / "a-1", background)
    monkeypatch.setattr(sealing, "sync_files", lambda _: fail())
    save(tmp_path / "a-2", background)
    with pytest.raises(StorageError, match="could not be made durable"):
        save(tmp_path / "a-3", background)
    assert names(tmp_path) == ["a-1", "a-2"]
    monkeypatch.undo()
    save(tmp_path / "a-3", background)
    assert holdfast.newest_good(tmp_path, "a-*") == tmp_path / "a-3"


def test_a_checkpoint_is_complete_before_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1. Method: the sync of the second save waits until we have checked the folder."""
    background, may_end = BackgroundSync(), threading.Event()
    save(tmp_path / "a-1", background)
    monkeypatch.setattr(sealing, "sync_files", lambda _: may_end.wait())
    save(tmp_path / "a-2", background)
    assert holdfast.check(tmp_path / "a-2") == []
    assert holdfast.newest_good(tmp_path, "a-*") == tmp_path / "a-2"
    may_end.set()
    background.wait()


def test_the_thread_ends_with_its_owner(caplog: pytest.LogCaptureFixture) -> None:
    """G7. Then nobody can catch the error of a sync, so it is logged."""
    caplog.set_level("WARNING", "holdfast")  # The stack that is logged at DEBUG holds the owner.
    background, threads = BackgroundSync(), []
    background.sync("good", lambda: threads.append(threading.current_thread()))
    background.sync("new", fail)
    background.delete("old", lambda: threads.append(threading.current_thread()))
    del background
    deadline = time.monotonic() + 30
    while not threads and time.monotonic() < deadline:
        time.sleep(0.01)
    gc.collect()
    threads[0].join(30)
    assert not threads[0].is_alive()
    assert len(threads) == 1, "the deletion followed a sync that failed"
    assert caplog.text.count("`new` was saved, but could not be made durable") == 1


def test_jobs_that_are_done_are_dropped() -> None:
    """Method: many files, one after the other, as a host saves them that waits at its end only."""
    background = BackgroundSync()
    for number in range(20):
        background.make_way(f"new-{number}")
        done = threading.Event()
        background.sync(f"new-{number}", done.set)
        done.wait()
    assert len(background._jobs) < 5
    background.wait()
