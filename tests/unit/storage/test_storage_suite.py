"""Every store passes the shipped suite; further tests of single stores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashes import RecordingStore
from holdfast.errors import ExistsError, NotFoundError, StorageError
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import FolderStore
from holdfast.testing.failing import FailingStore
from holdfast.testing.stores import FolderStoreSuite, put, refuses


class TestMemoryStore(FolderStoreSuite):
    """A store in memory."""

    def new_store(self) -> FolderStore:
        return MemoryStore()


class TestMemoryStoreOfLimitedSize(FolderStoreSuite):
    """A store in memory, with room for a mebibyte."""

    def new_store(self) -> FolderStore:
        return MemoryStore(1 << 20)


class TestRecordingStore(FolderStoreSuite):
    """A store that records its operations."""

    def new_store(self) -> FolderStore:
        return RecordingStore()


class TestFailingStore(FolderStoreSuite):
    """A store whose operations may fail, while none does."""

    def new_store(self) -> FolderStore:
        return FailingStore(MemoryStore(), lambda *_: None)


class TestLocalStore(FolderStoreSuite):
    """A local folder."""

    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def new_store(self) -> FolderStore:
        return LocalStore(self.folder)

    def test_several_writers_fill_one_large_file(self) -> None:
        """G1. Method: a file that is written with `O_DIRECT`, in parts that end inside of pages."""
        store, data = self.new_store(), bytes(range(251)) * 20_000
        assert isinstance(store, LocalStore)
        third = len(data) // 3
        with store.create("file", len(data)) as first:
            first.write(0, [data[:third]])
            with store.join("file") as second, store.join("file") as other:
                other.write(2 * third, [data[2 * third :]])
                second.write(third, [data[third : 2 * third]])
        assert store.read("file", 0, len(data)) == data


class TestLocalStoreReachedByALink(TestLocalStore):
    """A folder that is reached through a symbolic link."""

    def new_store(self) -> FolderStore:
        (self.folder / "real").mkdir()
        (self.folder / "link").symlink_to("real")
        return LocalStore(self.folder / "link")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one mebibyte, if this process may."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_detected_before_the_first_byte_is_written(small_disk: Path) -> None:
    """G11. Method: a tmpfs of 1 MiB and a file of 2 MiB; the body of `create` never runs, the error
    has a hint, and existing files are unchanged."""
    store = LocalStore(small_disk)
    put(store, "kept", b"kept")
    ran = []

    def write() -> None:
        with store.create("large", 2 << 20):
            ran.append("the caller")

    error = refuses(StorageError, write)
    assert "No space left on device" in error.what
    assert "df -h" in (error.hint or "")
    assert not ran
    assert store.read("kept", 0, 9) == b"kept"


def test_free_space_is_that_of_the_file_system(small_disk: Path) -> None:
    """G11. Method: a tmpfs of 1 MiB, empty and then half full."""
    store = LocalStore(small_disk)
    assert store.free_bytes() == 1 << 20
    put(store, "half", bytes(1 << 19))
    assert store.free_bytes() == 1 << 19


def test_a_read_only_disk_is_named_in_the_error(small_disk: Path) -> None:
    """G11. Method: a tmpfs, remounted read-only; every change is refused, reading works."""
    store = LocalStore(small_disk)
    store.make_folder("step-1")
    put(store, "step-1/file", b"kept")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for change in (
        lambda: put(store, "new", b"1"),
        lambda: store.make_folder("folder"),
        lambda: store.rename("step-1", "step-2"),
        lambda: store.remove("step-1"),
    ):
        error = refuses(StorageError, change)
        assert "Read-only file system" in error.what
        assert "read-only" in (error.hint or "")
    assert store.read("step-1/file", 0, 9) == b"kept"


def test_a_file_in_place_of_the_folder_is_named_in_the_hint(tmp_path: Path) -> None:
    """G11. Method: a store whose root is a file."""
    (tmp_path / "file").write_bytes(b"")
    store = LocalStore(tmp_path / "file")
    error = refuses(StorageError, lambda: store.make_folder("step-1"))
    assert "Not a directory" in error.what
    assert "a file has the name of the folder" in (error.hint or "")


LIMITED = """
import os, resource, sys, holdfast
holdfast.save("warm", {"a": 1})
if sys.argv[1] == "EMFILE":
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        # Enough to make the attempt and to hold it, and too few to write a file.
        os.close(held.pop())
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    holdfast.save("kept", {"a": "x" * 9999})
except holdfast.StorageError as error:
    found = str(error)
for file in held if sys.argv[1] == "EMFILE" else ():
    os.close(file)
print(found, sorted(os.listdir(".")), sep="\\n")
"""


@pytest.mark.parametrize(
    ("limit", "said", "hint"),
    [
        ("EMFILE", "Too many open files", "`ulimit -n`"),
        ("EFBIG", "File too large", "`ulimit -f`"),
    ],
)
def test_a_limit_of_the_process_is_named_and_nothing_is_left(
    limit: str, said: str, hint: str, tmp_path: Path
) -> None:
    """G8, G11. Method: a save in a process without a free file descriptor, and in one whose files
    may have 4096 bytes."""
    command = f"ulimit -n 128; exec {sys.executable} -c '{LIMITED}' {limit}"
    ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    what, advice, left = ran.stdout.splitlines()
    assert said in what
    assert hint in advice
    assert left == "['warm']"


def test_a_deleted_folder_is_named_in_the_error(tmp_path: Path) -> None:
    """G11. Method: the root deleted under the store."""
    store = LocalStore(tmp_path / "root")
    store.make_folder("")
    (tmp_path / "root").rmdir()
    for change in (lambda: put(store, "new", b"1"), lambda: store.make_folder("folder")):
        error = refuses(StorageError, change)
        assert str(tmp_path / "root") in error.what
        assert "mkdir -p" in (error.hint or "")
    refuses(NotFoundError, store.list)


def test_removing_a_link_keeps_its_target(tmp_path: Path) -> None:
    """G5. Method: a symbolic link to a folder outside, as people make for `best`."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"kept")
    store = LocalStore(tmp_path / "root")
    store.make_folder("")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    store.remove("link")
    assert (tmp_path / "outside" / "file").read_bytes() == b"kept"
    assert list(store.list()) == []


def test_a_broken_link_takes_a_name_too(tmp_path: Path) -> None:
    """G1. Method: publishing to a broken symbolic link, which `exists` does not see."""
    store = LocalStore(tmp_path)
    store.make_folder("attempt")
    (tmp_path / "step-1").symlink_to("nowhere")
    refuses(ExistsError, lambda: store.rename("attempt", "step-1"))


HOLDER = """
import sys, time
from holdfast.storage.local import LocalStore
with LocalStore(sys.argv[1]).lock(".lock", "run 7, process of the test"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_is_free_once_it_is_killed(
    tmp_path: Path,
) -> None:
    """G11. Method: a process that holds the lock. It is refused twice, so that the first refusal
    has not emptied the note. After SIGKILL the lock is free at once."""
    store = LocalStore(tmp_path)
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"held\n"
            for _ in range(2):
                with pytest.raises(ExistsError, match="run 7, process of the test"):
                    store.lock(".lock", "mine").__enter__()
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    with store.lock(".lock", "mine"):
        assert (tmp_path / ".lock").read_text() == "mine"
    assert (tmp_path / ".lock").read_text() == ""


def test_a_full_store_in_memory_refuses_files_and_is_unchanged() -> None:
    """G11. Method: room for ten bytes."""
    store = MemoryStore(10)
    put(store, "kept", b"12345678")
    error = refuses(StorageError, lambda: put(store, "more", b"abc"))
    assert "need 3 bytes, 2 are free" in error.what
    assert list(store.list()) == ["kept"]
