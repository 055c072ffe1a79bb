"""Locks on a file system without flock."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.errors import ExistsError
from holdfast.format.names import TAKING
from holdfast.storage import leases, locks, processes
from holdfast.storage.local import LocalStore
from holdfast.storage.store import FolderStore
from holdfast.testing.stores import FolderStoreSuite, put


@pytest.fixture(autouse=True)
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make flock fail as on Lustre mounted with `noflock`, and leases lapse within seconds."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(leases, "LEASE_S", 4.0)
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    monkeypatch.setattr(leases, "SKEW_S", 1.0)


class TestLocalStoreWithoutFlock(FolderStoreSuite):
    """A local folder of a file system without flock."""

    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def new_store(self) -> FolderStore:
        return LocalStore(self.folder)

    def test_a_held_folder_stays_held_when_it_is_renamed(self) -> None:
        """G16. Method: renamed as its holder renames it before it is deleted. The file that is
        locked instead of a folder has the name of the checkpoint."""
        store = self.new_store()
        store.make_folder("one")
        with store.hold("one") as held:
            assert held
            store.rename("one", ".removing-one-1f2e3d4c")
            with store.hold(".removing-one-1f2e3d4c") as again:
                assert again is False
        with store.hold(".removing-one-1f2e3d4c") as held:
            assert held

    def test_a_held_folder_may_be_read_and_removed(self) -> None:
        """G16. Method: by its holder; the name is free once the hold ends."""
        store = self.new_store()
        store.make_folder("one")
        put(store, "one/file", b"1")
        with store.hold("one") as held:
            assert held
            assert store.read("one/file", 0, 9) == b"1"
            store.remove("one")
        store.make_folder("one")
        with store.hold("one") as other:
            assert other


def of_another_process(path: Path, note: str = "host elsewhere, pid 7") -> None:
    """Write the lease of a process that has not released it."""
    path.write_text(note + leases.MARKER)


@pytest.mark.parametrize("code", leases.UNSUPPORTED)
def test_a_run_locks_its_folder_on_any_file_system_without_flock(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11. Method: each error of flock; the lock is taken, refused to a second run, and free
    afterwards."""

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    store = LocalStore(tmp_path)
    for _ in range(2):
        with store.lock(".lock", "run 7") as check:
            check()
            with pytest.raises(ExistsError, match="run 7"):
                store.lock(".lock", "run 8").__enter__()
            assert store.holder(".lock") == "run 7"
        assert store.holder(".lock") is None
    assert [*tmp_path.iterdir()] == []


def test_a_live_lease_is_refused_and_a_lapsed_one_is_taken(tmp_path: Path) -> None:
    """G11, G16. Method: a lease that another thread renews, as its process would; then nobody does,
    and a start waits until it has lapsed."""
    path, ended = tmp_path / ".lock", threading.Event()
    of_another_process(path)

    def renew() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    renewing = threading.Thread(target=renew)
    renewing.start()
    store = LocalStore(tmp_path)
    with pytest.raises(ExistsError, match="in use by another run: host elsewhere, pid 7"):
        store.lock(".lock", "mine").__enter__()
    assert store.holder(".lock") == "host elsewhere, pid 7"
    ended.set()
    renewing.join()
    started = time.monotonic()
    with store.lock(".lock", "mine"):
        assert time.monotonic() - started > 0.3
        assert locks.read_note(os.fspath(path)) == "mine"


def ended_process() -> tuple[int, str]:
    """PID of a process of this machine that has ended, and the line of a lease that names it."""
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writes, processes.this_process().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    line = f"\nprocess {os.read(reads, 1024).decode()}"
    for end in (reads, writes):
        os.close(end)
    return pid, line


def test_the_lease_of_a_process_of_this_host_that_has_ended_is_taken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11. Method: the lease names a process that does not exist."""
    monkeypatch.setattr(leases, "LEASE_S", 60.0)
    pid, line = ended_process()
    note = f"host {os.uname().nodename}, pid {pid}, since long"
    of_another_process(tmp_path / ".lock", note + line)
    assert LocalStore(tmp_path).holder(".lock") is None
    with LocalStore(tmp_path).lock(".lock", "mine") as check:
        check()


def test_a_lease_is_not_taken_from_a_process_of_another_container_of_this_name(
    tmp_path: Path,
) -> None:
    """G11, G16. Method: a lease that is renewed, of a host of this name whose process IDs are not
    those of this one; with another PID namespace in the lease, and with no process in it."""
    pid, line = ended_process()
    note = f"host {os.uname().nodename}, pid {pid}, since long"
    words = line.split()
    elsewhere = "\n" + " ".join([words[0], words[1], "1", *words[3:]])
    store = LocalStore(tmp_path)
    for held in (note + elsewhere, note):
        of_another_process(tmp_path / ".lock", held)
        ended = threading.Event()

        def renew(ended: threading.Event = ended) -> None:
            while not ended.wait(0.05):
                os.utime(tmp_path / ".lock")

        renewing = threading.Thread(target=renew)
        renewing.start()
        try:
            assert store.holder(".lock") == note
            with pytest.raises(ExistsError, match="in use by another run: host"):
                store.lock(".lock", "mine").__enter__()
        finally:
            ended.set()
            renewing.join()


def test_a_holder_that_lost_its_lease_is_told_before_its_next_change(tmp_path: Path) -> None:
    """G16. Method: another process has taken the lease, as it may if this one was suspended; it
    renews it."""
    store = LocalStore(tmp_path)
    catalog = Catalog(store)
    with store.lock(".lock", "mine") as catalog.check_lock:
        catalog.abort(catalog.begin("step-1"))
        of_another_process(tmp_path / "theirs")
        (tmp_path / "theirs").rename(tmp_path / ".lock")
        os.utime(tmp_path / ".lock", (time.time() + 60, time.time() + 60))
        with pytest.raises(ExistsError, match="this run has lost its folder"):
            catalog.begin("step-1")
    assert (tmp_path / ".lock").exists(), "it is the other's"


def test_of_many_that_take_a_lapsed_lease_one_gets_it(tmp_path: Path) -> None:
    """G16. Method: eight threads at once, again and again; the file of a process that died while it
    took the lease is there at first."""
    path = os.fspath(tmp_path / "file")
    for _ in range(20):
        of_another_process(tmp_path / "file")
        os.utime(path, (0, 0))
        taken: list[leases.Lease] = []
        barrier = threading.Barrier(8)

        def take(taken: list[leases.Lease] = taken, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            lease = leases.take_lease(path, waits=False)
            if lease is not None:
                taken.append(lease)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        taken[0].release()
    (tmp_path / f"file{TAKING}").touch()
    os.utime(f"{path}{TAKING}", (0, 0))
    assert leases.take_lease(path, waits=False) is None
    lease = leases.take_lease(path, waits=False)
    assert lease is not None
    lease.release()


def test_a_cleanup_spares_an_attempt_at_work_and_deletes_one_that_was_left(tmp_path: Path) -> None:
    """G16. Method: an attempt that this process holds by a lease, then one whose lease has
    lapsed."""
    store = LocalStore(tmp_path)
    catalog = Catalog(store)
    attempt = catalog.begin("step-1")
    put(store, f"{attempt}/file", b"1")
    assert execute(store, plan_cleanup(store.list())) == []
    assert f"{attempt}/" in store.list()
    catalog.release_all()
    assert execute(store, plan_cleanup(store.list())) == []
    assert store.list() == []
