"""A view that lists each folder once says the same about links as its store."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import NotFoundError
from holdfast.storage.listed import ListedStore
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, links to inside and outside, and a folder."""
    (tmp_path / "outside").write_text("private")
    made = tmp_path / "run"
    (made / "deeper").mkdir(parents=True)
    (made / "deeper" / "out").symlink_to(tmp_path / "outside")
    (made / "file").write_text("content")
    (made / "in").symlink_to(made / "file")
    (made / "out").symlink_to(tmp_path / "outside")
    (made / "broken").symlink_to(tmp_path / "nowhere")
    return made


@pytest.mark.parametrize("listed_before", [True, False])
@pytest.mark.parametrize("file", ["file", "in", "out", "broken", "deeper/out", "missing"])
def test_links_that_lead_out_are_found(folder: Path, file: str, listed_before: bool) -> None:
    """Method: the store itself, and the view, before and after it has listed the folder."""
    store = LocalStore(folder.parent)
    listed = ListedStore(store)
    if listed_before:
        assert [*listed.list("run")] == [*store.list("run")]
    assert listed.leads_out("run", file) == store.leads_out("run", file)
    assert listed.leads_out("run", "out")


def test_a_folder_of_many_names_is_searched_and_listed_once() -> None:
    """Method: names below and above the number from which a set is made."""
    for count in (3, 100):
        store = MemoryStore()
        store.make_folder("")
        names = [f"step-{number}" for number in range(count)]
        for name in names:
            store.make_folder(name)
        listed = ListedStore(store)
        assert "step-2/" in listed.list()
        assert "step-200/" not in listed.list()
        assert [*listed.list()] == [*store.list()]
        store.remove("step-2")
        assert "step-2/" in listed.list()
        with pytest.raises(NotFoundError):
            listed.list("step-2000")
