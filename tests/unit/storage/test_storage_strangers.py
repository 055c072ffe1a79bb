"""What a stranger, or another process, may have put where a store looks: no wait, no harm."""

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
from holdfast.testing.stores import put, refuses


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


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
def test_what_is_no_plain_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    """G8. Method: a pipe, a socket and a device, read and asked for in every way; a folder with
    one of them is listed."""
    STRANGE[kind](tmp_path / "strange")
    store = LocalStore(tmp_path)
    for ask in (
        lambda: store.size("strange"),
        lambda: store.read("strange", 0, 9),
        lambda: store.read_into("strange", 0, memoryview(bytearray(9))),
        lambda: store.amend("strange").__enter__(),
    ):
        error = refuses((FormatError, StorageError), ask)
        assert "strange" in error.what
    assert kind in refuses(FormatError, lambda: store.read("strange", 0, 9)).what
    assert list(store.list()) == ["strange"]


def test_a_read_takes_memory_for_what_is_there(tmp_path: Path) -> None:
    """G8. Method: a tebibyte asked for, of a file that has nine bytes."""
    (tmp_path / "file").write_bytes(b"nine byte")
    assert LocalStore(tmp_path).read("file", 0, 1 << 40) == b"nine byte"


def test_a_link_that_leads_in_a_circle_does_not_end_a_walk(tmp_path: Path) -> None:
    """G8. Method: two links to each other beside a file and a folder."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "folder").mkdir()
    store = LocalStore(tmp_path)
    assert list(store.list()) == ["a", "b", "folder/"]
    assert store.stamp("")


@pytest.mark.parametrize("kind", ["a link", "a folder", *STRANGE])
def test_a_lock_that_is_no_plain_file_is_refused_and_left(kind: str, tmp_path: Path) -> None:
    """G16: nothing is emptied through a link. Method: each in the place of `.lock`."""
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


def test_a_lock_with_a_second_name_keeps_what_the_other_name_holds(tmp_path: Path) -> None:
    """G16. Method: `.lock` is a hard link to somebody's file."""
    (tmp_path / "precious").write_text("years")
    (tmp_path / ".lock").hardlink_to(tmp_path / "precious")
    store = LocalStore(tmp_path)
    with store.lock(".lock", "mine"):
        assert (tmp_path / ".lock").read_text() == "mine"
        refuses(ExistsError, lambda: store.lock(".lock", "other").__enter__())
    assert (tmp_path / "precious").read_text() == "years"


def test_links_lead_out_of_a_folder_except_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    """G8. Method: links to a file beside, inside and outside of a folder, through a folder that is
    a link, and as the Hugging Face cache has them, well and ill meant; by path and by `file://`."""
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
def test_a_place_to_write_to_is_a_folder_of_this_machine(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G16. Method: URLs, one as `pathlib` makes it, and nothing; no folder is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        folder_store(path).make_folder("")
    if path.startswith("s3:/") and "://" in path:
        with pytest.raises(UsageError):
            folder_store(Path(path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_opened_by_its_path_and_by_its_url(tmp_path: Path) -> None:
    """Method: both ways; the store reads plain files alone either way."""
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        store = open_store(url)
        assert isinstance(store, LocalStore)
        assert store.url == str(tmp_path)


def test_where_the_system_has_no_exclusive_rename_nothing_is_replaced_either(
    tmp_path: Path,
) -> None:
    """G16. Method: what NFS gets: a folder and a file, onto each kind of name that is taken."""
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


def test_of_many_threads_that_rename_to_one_name_one_does(tmp_path: Path) -> None:
    """G16. Method: eight threads at once, many times over, by the system's own rename and by what
    stands in for it."""
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
    """A process forked off that does `work` and then lives on; its id."""
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


def test_a_forked_child_neither_keeps_nor_ends_what_its_parent_holds(tmp_path: Path) -> None:
    """G17. Method: a lock and a held folder inherited by a child, which leaves both contexts; the
    parent still holds them, then a grandchild of nobody: both are free while a child lives on."""
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


def test_a_second_holder_in_one_process_is_told_that_it_is_this_one(tmp_path: Path) -> None:
    """G16. Method: twice from here, once from a process forked off."""
    store = LocalStore(tmp_path)
    with store.lock(".lock", f"host {os.uname().nodename}, pid {os.getpid()}"):
        error = refuses(ExistsError, lambda: store.lock(".lock", "again").__enter__())
        assert "held by this process already" in error.what
        told = tmp_path / "told"

        def ask() -> None:
            try:
                store.lock(".lock", "child").__enter__()
            except HoldfastError as refused:
                told.write_text(refused.what)

        end(fork(ask))
        assert "in use by another run" in told.read_text()
        assert f"pid {os.getpid()}" in told.read_text()


def test_a_lock_without_a_process_names_those_that_keep_it(tmp_path: Path) -> None:
    """G17. Method: a note of a process that has ended, and its lock kept by one that knows of no
    fork of ours, as native code makes them."""
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


def test_where_folders_cannot_be_locked_a_file_beside_them_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G16. Method: what NFS says when a folder is locked; two stores, a rename, the end."""
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
