"""Hard links of files, in every store that has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crashes import RecordingStore
from holdfast.errors import FormatError, NotFoundError, StorageError
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore
from holdfast.testing.failing import FailingStore, LinkingStore
from holdfast.testing.stores import put


@pytest.fixture(params=["local", "memory", "recording", "failing"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LinkingStore:
    stores: dict[str, LinkingStore] = {
        "local": LocalStore(tmp_path),
        "memory": MemoryStore(),
        "recording": RecordingStore(),
        "failing": FailingStore(MemoryStore(), lambda *_: None),
    }
    chosen = stores[request.param]
    chosen.make_folder("")
    for folder in ("a", "b"):
        chosen.make_folder(folder)
    put(chosen, "a/file", b"content")
    return chosen


def test_a_linked_file_stays_until_its_last_name_is_removed(store: LinkingStore) -> None:
    """G19. Method: a second name in another folder; then the first folder is removed."""
    store.link("a/file", "b/other")
    store.sync("b")
    store.evict("b/other")
    assert store.links("a/file") == store.links("b/other")
    assert store.links("a/file").count == 2
    store.remove("a")
    assert store.read("b/other", 0, 100) == b"content"
    assert store.links("b/other").count == 1


def test_a_link_never_replaces_a_file(store: LinkingStore) -> None:
    """G19. Method: a name that is taken; a source that is missing."""
    put(store, "b/other", b"precious")
    with pytest.raises(StorageError, match="exists"):
        store.link("a/file", "b/other")
    assert store.read("b/other", 0, 100) == b"precious"
    with pytest.raises(NotFoundError):
        store.link("a/missing", "b/new")
    assert store.list("b") == ["other"]


def test_two_files_are_not_links_of_each_other(store: LinkingStore) -> None:
    """Method: files with the same content."""
    put(store, "b/other", b"content")
    assert store.links("a/file").file != store.links("b/other").file
    assert store.links("a/file").count == 1


def test_a_shared_file_takes_space_once() -> None:
    """G11. Method: a store with room for less than two copies."""
    store = MemoryStore(150)
    put(store, "file", bytes(100))
    store.link("file", "other")
    assert store.free_bytes() == 50


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_plain_files_are_linked(tmp_path: Path, kind: str) -> None:
    """G8. Method: a symbolic link, a pipe and a folder; nothing has the new name afterwards."""
    source = tmp_path / "source"
    if kind == "link":
        (tmp_path / "secret").write_text("secret")
        source.symlink_to("secret")
    elif kind == "pipe":
        os.mkfifo(source)
    else:
        source.mkdir()
    with pytest.raises((StorageError, FormatError, NotFoundError)):
        LocalStore(tmp_path).link("source", "target")
    assert not os.path.lexists(tmp_path / "target")
