"""The simulation of power cuts: its model of a disk, and the mistakes that it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from benchmarks.power_cuts import Operation, SimulatedDisk, cuts
from hypothesis import given
from hypothesis import strategies as st

from crashes import cut_everywhere, recorded, store_of
from holdfast.errors import NotFoundError
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import FolderStore
from holdfast.testing.stores import put

OLD, NEW = b"o" * 10_000, b"n" * 10_000


def write(disk: SimulatedDisk, path: str, file: int, data: bytes) -> None:
    disk.apply(Operation("create", path, file))
    disk.apply(Operation("write", path, file, 0, data))


def test_only_synced_changes_survive_if_all_others_are_lost() -> None:
    """G2. Method: each rule of the model, broken one at a time."""
    disk = SimulatedDisk()
    disk.apply(Operation("make_folder", "named"))
    write(disk, "named/synced", 1, b"1")
    disk.apply(Operation("sync_file", "named/synced", 1))
    write(disk, "named/empty", 2, b"2")
    disk.apply(Operation("sync_folder", "named"))
    write(disk, "named/nameless", 3, b"3")
    disk.apply(Operation("sync_file", "named/nameless", 3))
    assert disk.survivors("lost", 0) == {}
    disk.apply(Operation("sync_folder", ""))
    expected: dict[str, bytes | None] = {"named": None, "named/synced": b"1", "named/empty": b""}
    assert disk.survivors("lost", 0) == expected
    disk.apply(Operation("rename", "named", target="renamed"))
    disk.apply(Operation("unlink", "renamed/synced"))
    assert disk.survivors("lost", 0) == expected
    assert disk.survivors("killed", 0) == {
        "renamed": None, "renamed/empty": b"2", "renamed/nameless": b"3"
    }  # fmt: skip
    disk.apply(Operation("sync_folder", ""))
    assert disk.survivors("lost", 0) == {
        "renamed": None, "renamed/synced": b"1", "renamed/empty": b""
    }  # fmt: skip
    disk.settle()
    for version in ("lost", "reordered", "torn"):
        assert disk.survivors(version, 5) == disk.survivors("killed", 0)


def test_the_extremes_of_reordering_are_names_without_data_and_data_without_names() -> None:
    """G2. Method: a new file and a change of an old one, nothing synced."""
    disk = SimulatedDisk()
    write(disk, "old", 1, b"before")
    disk.settle()
    disk.apply(Operation("write", "old", 1, 0, b"after!"))
    write(disk, "new", 2, b"new")
    assert disk.survivors("reordered", 0) == {"old": b"before", "new": b""}
    assert disk.survivors("reordered", 1) == {"old": b"after!"}
    seen = {tuple(disk.survivors("reordered", seed).items()) for seed in range(100)}
    assert len(seen) == 6, "each of three operations, but for data of a file without its name"


@given(st.integers(0, 1000), st.integers(1, 5 * 4096))
def test_a_torn_write_keeps_a_prefix_or_some_of_its_pages(seed: int, size: int) -> None:
    """G2. Method: a synced file overwritten; every byte is an old or a new one, and within a page
    the new ones come first."""
    disk = SimulatedDisk()
    write(disk, "file", 1, b"o" * size)
    disk.settle()
    disk.apply(Operation("write", "file", 1, 0, b"n" * size))
    (data,) = disk.survivors("torn", seed).values()
    assert data is not None
    assert len(data) == size
    for start in range(0, size, 4096):
        assert data[start : start + 4096].lstrip(b"n").strip(b"o") == b""


def in_place(store: FolderStore) -> None:
    """Deletes the old file before the new one exists."""
    store.remove("folder/file")
    put(store, "folder/file", NEW)
    store.sync("folder")


def names_not_synced(store: FolderStore) -> None:
    """Does not make the name of the new file durable."""
    store.make_folder("new")
    put(store, "new/file", NEW)
    swap(store)


def data_not_synced(store: FolderStore) -> None:
    """Publishes before the content of the file is durable."""
    store.make_folder("new")
    with store.create("new/file", len(NEW)) as writer:
        writer.write(0, [NEW])
        store.sync("new")
        swap(store)


def removed_in_place(store: FolderStore) -> None:
    """Deletes the files of the old folder under a name that readers use."""
    careful(store)
    store.remove("old")
    store.rename("folder", "old")
    store.remove("old")


def swap(store: FolderStore) -> None:
    store.rename("folder", "old")
    store.rename("new", "folder")


def careful(store: FolderStore) -> None:
    """Makes no mistake."""
    store.make_folder("new")
    put(store, "new/file", NEW)
    store.sync("new")
    store.sync("")
    swap(store)


def look(store: MemoryStore) -> str:
    """Read the file like a reader that uses `old` if `folder` does not exist."""
    folder = "folder" if "folder/" in store.list() else "old"
    try:
        data = store.read(f"{folder}/file", 0, 1 << 20)
    except NotFoundError:
        return "lost"
    return {OLD: "old", NEW: "new"}.get(data, "torn")


def before(store: FolderStore) -> None:
    store.make_folder("folder")
    put(store, "folder/file", OLD)


@pytest.mark.parametrize(
    ("mistake", "seen"),
    [
        (in_place, {"lost", "torn"}),
        (names_not_synced, {"lost"}),
        (data_not_synced, {"torn"}),
        (removed_in_place, {"lost"}),
        (careful, set()),
    ],
)
def test_mistakes_in_protocols_are_found(
    mistake: Callable[[FolderStore], None], seen: set[str]
) -> None:
    """G2. Method: four protocols with one mistake each, and one without."""
    outcomes = Counter(outcome for _, outcome in cut_everywhere(mistake, look, before=before))
    assert set(outcomes) - {"old", "new"} == seen, outcomes


def test_an_error_of_load_has_a_note_with_the_cut() -> None:
    def refuse(store: MemoryStore) -> None:
        assert store.list() != ["folder/", "new/"], "mine"

    with pytest.raises(AssertionError, match="mine") as caught:
        cut_everywhere(careful, refuse, before=before)
    assert caught.value.__notes__[0].startswith("cut 1, killed (0), after: make_folder new")


def test_the_recorded_operations_give_the_content_of_the_store() -> None:
    """Method: every kind of operation; the process dies after the last."""

    def work(store: FolderStore) -> None:
        before(store)
        careful(store)
        store.remove("old")

    (operations,) = recorded(work)
    *_, (cut, tree) = [entry for entry in cuts(operations) if entry[0].version == "killed"]
    assert cut.at == len(operations)
    assert tree == {"folder": None, "folder/file": NEW}
    assert store_of(tree).read("folder/file", 0, 99_999) == NEW
