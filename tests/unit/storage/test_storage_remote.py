"""Reading from a URL, through the in-memory file system of fsspec."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import fsspec
import pytest
import torch

import holdfast
from holdfast.errors import NotFoundError, StorageError, UsageError
from holdfast.storage.remote import RemoteStore

DATA = bytes(range(50))


@pytest.fixture
def url() -> Iterator[str]:
    """Return a new folder at `memory://` with a file and a folder in it."""
    root = f"/holdfast-{uuid.uuid4().hex}"
    files = fsspec.filesystem("memory")
    files.makedirs(f"{root}/folder/inner")
    files.pipe_file(f"{root}/folder/file", DATA)
    yield f"memory:/{root}"
    files.rm(root, recursive=True)


def test_every_range_of_a_file_is_read(url: str) -> None:
    """Method: all ranges in and past the file, by `read` and by an open file."""
    store = RemoteStore(url)
    assert store.size("folder/file") == len(DATA)
    for start in (0, 1, 49, 50):
        for stop in (*range(start, 52, 7), 50, 60):
            assert store.read("folder/file", start, stop) == DATA[start:stop]
            target = bytearray(b"?" * max(0, stop - start))
            with store.open("folder/file") as reader:
                count = reader.read_into(start, memoryview(target))
            assert target[:count] == DATA[start:stop]


def test_names_are_listed_with_folders_marked(url: str) -> None:
    """Method: a folder with a file and a folder in it."""
    assert list(RemoteStore(url).list("folder")) == ["file", "inner/"]
    assert list(RemoteStore(url).list()) == ["folder/"]


def test_a_missing_file_is_not_found(url: str) -> None:
    """Method: every reading method."""
    store = RemoteStore(url)
    for ask in (
        lambda: store.list("absent"),
        lambda: store.size("absent"),
        lambda: store.read("absent", 0, 1),
    ):
        with pytest.raises(NotFoundError, match="absent"):
            ask()


def test_an_error_of_the_client_becomes_a_storage_error_with_the_url(url: str) -> None:
    """G11. Method: reading a folder as a file."""
    with pytest.raises((StorageError, NotFoundError), match="folder"):
        RemoteStore(url).read("folder", 0, 1)


def test_an_unknown_scheme_is_refused() -> None:
    """Method: an invented scheme."""
    with pytest.raises(UsageError, match="cannot be opened"):
        RemoteStore("madeup://bucket")


def test_a_checkpoint_at_a_url_is_loaded_and_checked(
    url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """G3, G10. Method: saved to a folder, copied to the URL, loaded; then with one bit flipped."""
    folder = tmp_path_factory.mktemp("saved")
    state = {"w": torch.randn(300, 7), "n": 3}
    holdfast.save(folder / "step-1", state)
    files = fsspec.filesystem("memory")
    root = url.removeprefix("memory:/")
    for file in sorted((folder / "step-1").iterdir()):
        files.pipe_file(f"{root}/step-1/{file.name}", file.read_bytes())
    target = {"w": torch.zeros(300, 7), "n": 0}
    holdfast.load(f"{url}/step-1", target)
    assert torch.equal(target["w"], state["w"])  # type: ignore[arg-type]
    assert target["n"] == 3
    data = bytearray(files.cat_file(f"{root}/step-1/__0_0.distcp"))
    at = holdfast.open(folder / "step-1").tensors["w"].chunks[0].data_offset
    assert at is not None
    data[at + 100] ^= 4
    files.pipe_file(f"{root}/step-1/__0_0.distcp", bytes(data))
    with pytest.raises(holdfast.errors.DamagedError, match="block 0 of `w`"):
        holdfast.load(f"{url}/step-1", target)
