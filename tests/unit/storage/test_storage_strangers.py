"""Untrusted files, other processes and forked children beside a store."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.errors import ExistsError, FormatError, HoldfastError, StorageError, UsageError
from holdfast.storage import renaming
from holdfast.storage.local import LocalStore
from holdfast.storage.opening import folder_store, open_store
from holdfast.storage.remote import RemoteStore
from holdfast.testing.stores import put, read_opened, refuses


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(str(path))


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("devices need root")


STRANGE: dict[str, Callable[[Path], None]] = {
    "a named pipe": make_pipe,
    "a socket": make_socket,
    "a device": make_device,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", STRANGE)
def test_a_file_that_is_not_plain_is_refused_without_waiting(kind: str, tmp_path: Path) -> None:
    """G8. Method: a pipe, a socket and a device, opened by every method; a folder that contains one
    of them is listed."""
    STRANGE[kind](tmp_path / "strange")
    store = LocalStore(tmp_path)
    for ask in (
        lambda: store.size("strange"),
        lambda: store.read("strange", 0, 9),
        lambda: read_opened(store, "strange"),
        lambda: store.amend("strange").__enter__(),
    ):
        error = refuses((FormatError, StorageError), ask)
        assert "strange" in error.what
    assert kind in refuses(FormatError, lambda: store.read("strange", 0, 9)).what
    assert list(store.list()) == ["strange"]


def test_a_read_allocates_only_for_existing_bytes(tmp_path: Path) -> None:
    """G8. Method: a read of a tebibyte from a file of nine bytes."""
    (tmp_path / "file").write_bytes(b"nine byte")
    assert LocalStore(tmp_path).read("file", 0, 1 << 40) == b"nine byte"


def test_circular_links_do_not_break_a_listing(tmp_path: Path) -> None:
    """G8. Method: two links to each other beside a file and a folder."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "folder").mkdir()
    store = LocalStore(tmp_path)
    assert list(store.list()) == ["a", "b", "folder/"]
    assert store.stamp("")


@pytest.mark.parametrize("kind", ["a link", "a folder", *STRANGE])
def test_a_lock_that_is_no_plain_file_is_refused_and_kept(kind: str, tmp_path: Path) -> None:
    """G16: a lock never empties a file through a link. Method: each kind of file as `.lock`."""
    (tmp_path / "precious").write_text("years")
    lock = tmp_path / ".lock"
    if kind == "a link":
        lock.symlink_to("precious")
    elif kind == "a folder":
        lock.mkdir()
    else:
        STRANGE[kind](lock)
    store = LocalStore(tmp_path)
    error = refuses(StorageError, lambda: store.lock(".lock", "mine").__enter__())
    assert kind in error.what
    assert (tmp_path / "precious").read_text() == "years"
    assert store.holder(".lock") is None


def test_a_lock_with_a_hard_link_keeps_the_content_of_the_other_name(tmp_path: Path) -> None:
    """G16. Method: `.lock` is a hard link to a user's file."""
    (tmp_path / "precious").write_text("years")
    (tmp_path / ".lock").hardlink_to(tmp_path / "precious")
    store = LocalStore(tmp_path)
    with store.lock(".lock", "mine"):
        assert (tmp_path / ".lock").read_text() == "mine"
        refuses(ExistsError, lambda: store.lock(".lock", "other").__enter__())
    assert (tmp_path / "precious").read_text() == "years"


def test_links_out_of_a_folder_are_found_except_in_the_hugging_face_cache(tmp_path: Path) -> None:
    """G8. Method: links to a file beside, inside and outside of a folder, through a folder that is
    a link, and in the layout of the Hugging Face cache, valid and malicious; by path and by
    `file://`."""
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "aa").write_text("weights")
    (tmp_path / "secret").write_text("key")
    (cache / "blobs" / "bb").symlink_to(tmp_path / "secret")
    (snapshot / "plain").write_text("x")
    (snapshot / "beside").symlink_to("plain")
    (snapshot / "blob").symlink_to("../../blobs/aa")
    (snapshot / "through").symlink_to("../../blobs/bb")
    (snapshot / "out").symlink_to("../../../secret")
    (snapshot / "folder").symlink_to(tmp_path)
    wanted = {
        "plain": False,
        "beside": False,
        "blob": False,
        "through": True,
        "out": True,
        "folder/secret": True,
    }
    for store in (LocalStore(cache / "snapshots"), RemoteStore(f"file://{cache}/snapshots")):
        assert {file: store.leads_out("0123", file) for file in wanted} == wanted
    elsewhere = tmp_path / "snapshot"
    elsewhere.mkdir()
    (elsewhere / "blob").symlink_to("../models--org--name/blobs/aa")
    assert LocalStore(tmp_path).leads_out("snapshot", "blob")


@pytest.mark.parametrize("path", ["s3://bucket/run", "s3:/bucket/run", "gs://a", "file:///a", ""])
def test_only_local_folders_can_be_written_to(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G16. Method: URLs, also as `pathlib` shortens them, and an empty path; no folder is
    created."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        folder_store(path).make_folder("")
    if path.startswith("s3:/") and "://" in path:
        with pytest.raises(UsageError):
            folder_store(Path(path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_opened_by_path_and_by_url(tmp_path: Path) -> None:
    """Method: both; either store reads plain files only."""
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        store = open_store(url)
        assert isinstance(store, LocalStore)
        assert store.url == str(tmp_path)


def test_nothing_is_replaced_on_systems_without_exclusive_rename(
    tmp_path: Path,
) -> None:
    """G16. Method: the fallback for NFS: a folder and a file, to each kind of name that is
    taken."""
    store = LocalStore(tmp_path)
    for folder in ("source", "full"):
        store.make_folder(folder)
        put(store, f"{folder}/file", folder.encode())
    put(store, "plain", b"plain")
    put(store, "other", b"other")
    (tmp_path / "link").symlink_to("nowhere")
    for source in ("source", "plain"):
        for target in ("full", "other", "link"):
            with pytest.raises(FileExistsError):
                renaming.rename_without_flag(f"{tmp_path}/{source}", f"{tmp_path}/{target}")
    assert list(store.list()) == ["full/", "link", "other", "plain", "source/"]
    for source in ("source", "plain"):
        renaming.rename_without_flag(f"{tmp_path}/{source}", f"{tmp_path}/{source}-2")
    assert list(store.list()) == ["full/", "link", "other", "plain-2", "source-2/"]


def test_only_one_of_many_threads_renames_to_a_name(tmp_path: Path) -> None:
    """G16. Method: eight threads at once, many times, with the rename of the system and with the
    fallback."""
    for rename in (renaming.rename_exclusive, renaming.rename_without_flag):
        for number in range(20):
            base = tmp_path / f"{rename.__name__}-{number}"
            won: list[int] = []
            gate = threading.Barrier(8)

            def work(
                mine: int,
                base: Path = base,
                won: list[int] = won,
                gate: threading.Barrier = gate,
                rename: Callable[[str, str], None] = rename,
            ) -> None:
                source = base / f"source-{mine}"
                source.mkdir(parents=True)
                (source / "file").write_text(str(mine))
                gate.wait()
                try:
                    rename(str(source), str(base / "target"))
                except FileExistsError:
                    return
                won.append(mine)

            threads = [threading.Thread(target=work, args=(mine,)) for mine in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [(base / "target" / "file").read_text()] == list(map(str, won))


def fork(work: Callable[[], None]) -> int:
    """Fork a process that runs `work` and then stays alive; return its id."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writing, b"1")
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"1"
    os.close(reading)
    return pid


def end(pid: int) -> None:
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def test_a_forked_child_neither_keeps_nor_releases_locks_of_its_parent(tmp_path: Path) -> None:
    """G17. Method: a lock and a held folder, inherited by a child that leaves both contexts: the
    parent still holds them. After the parent releases them both are free, while a child still
    lives."""
    store = LocalStore(tmp_path)
    store.make_folder("folder")
    lock, hold = store.lock(".lock", "parent"), store.hold("folder")
    lock.__enter__()
    assert hold.__enter__()

    def leave() -> None:
        lock.__exit__(None, None, None)
        hold.__exit__(None, None, None)

    child = fork(leave)
    try:
        assert (tmp_path / ".lock").read_text() == "parent"
        refuses(ExistsError, lambda: store.lock(".lock", "other").__enter__())
        with store.hold("folder") as again:
            assert again is False
        lock.__exit__(None, None, None)
        hold.__exit__(None, None, None)
        with store.lock(".lock", "other"), store.hold("folder") as again:
            assert again
    finally:
        end(child)


def test_a_second_lock_in_one_process_says_that_this_process_holds_it(tmp_path: Path) -> None:
    """G16. Method: twice from this process, once from a forked one."""
    store = LocalStore(tmp_path)
    with store.lock(".lock", f"host {os.uname().nodename}, pid {os.getpid()}"):
        error = refuses(ExistsError, lambda: store.lock(".lock", "again").__enter__())
        assert "held by this process already" in error.what
        message = tmp_path / "told"

        def ask() -> None:
            try:
                store.lock(".lock", "child").__enter__()
            except HoldfastError as refused:
                message.write_text(refused.what)

        end(fork(ask))
        assert "in use by another run" in message.read_text()
        assert f"pid {os.getpid()}" in message.read_text()


def test_a_lock_of_a_dead_process_names_the_children_that_keep_it(tmp_path: Path) -> None:
    """G17. Method: a note of a process that has ended, and its lock kept by a child whose fork
    Python did not see, like those of native code."""
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    store = LocalStore(tmp_path)
    (tmp_path / ".lock").write_text(f"host {os.uname().nodename}, pid {gone}, since then")

    def keep() -> None:
        import fcntl

        file = os.open(tmp_path / ".lock", os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX)

    keeper = fork(keep)
    try:
        error = refuses(ExistsError, lambda: store.lock(".lock", "mine").__enter__())
        assert f"pid {gone}, since then, has ended" in error.what
        assert error.what.endswith(str(keeper))
    finally:
        end(keeper)
    with store.lock(".lock", "mine"):
        pass


def test_a_file_beside_a_folder_is_locked_if_folders_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G16. Method: the error of NFS on locking a folder; two stores, a rename, the release."""
    from holdfast.storage import locks

    def refused(path: str) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(locks, "lock_folder", refused)
    store = LocalStore(tmp_path)
    store.make_folder("one")
    with store.hold("one") as held:
        assert held
        with store.hold("one") as again:
            assert again is False
        assert len(store.list()) == 2
    assert list(store.list()) == ["one/"]
