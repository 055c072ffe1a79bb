"""Checkpoints that are single files: published, replaced, chosen for a resume."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.comm import Ranks
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.files import file_moved_aside, published
from holdfast.hosts.lightning import good_at
from holdfast.hosts.sealing import sealed_by_all
from holdfast.testing.ranks import run_ranks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail() -> None:
    raise OSError(5, "Input/output error")


def save_file(path: Path, background: BackgroundSync, number: int) -> None:
    with published(path, background) as file:
        torch.save({"n": torch.tensor(number)}, file)


def number_in(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["n"])


def test_leftovers_that_no_process_holds_are_deleted(tmp_path: Path) -> None:
    """A file of a killed save goes; one that is being written stays."""
    held, left = tmp_path / ".part-a-00000001", tmp_path / ".part-b-00000002"
    left.touch()
    with held.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save_file(tmp_path / "a", BackgroundSync(), 1)
        assert names(tmp_path) == [held.name, "a"]
    save_file(tmp_path / "b", BackgroundSync(), 1)
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("later", ["damaged", "missing", "good"])
def test_the_earlier_file_is_loaded_until_the_later_one_is_durable(
    tmp_path: Path, later: str, caplog: pytest.LogCaptureFixture
) -> None:
    """G2. Method: what a power cut leaves between the rename and the sync."""
    path = tmp_path / "model.ckpt"
    save_file(path, BackgroundSync(), 2)
    save_file(tmp_path / "earlier", BackgroundSync(), 1)
    (tmp_path / "earlier").rename(tmp_path / ".kept-model.ckpt-00000001")
    if later == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    elif later == "missing":
        path.unlink()
    assert number_in(good_at(path)) == (2 if later == "good" else 1)
    save_file(tmp_path / "another.ckpt", BackgroundSync(), 3)
    assert names(tmp_path) == ["another.ckpt", "model.ckpt"]
    assert number_in(path) == (2 if later == "good" else 1)
    assert ("gets its earlier file back" in caplog.text) == (later != "good")


def test_a_file_is_not_taken_for_the_earlier_one_of_another(tmp_path: Path) -> None:
    """Method: a killed save has left the earlier `model-a`; the name of `model` begins alike."""
    save_file(tmp_path / "earlier", BackgroundSync(), 1)
    (tmp_path / "earlier").rename(tmp_path / ".kept-model-a-00000001")
    assert good_at(tmp_path / "model") == tmp_path / "model"
    assert number_in(good_at(tmp_path / "model-a")) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_replaces_a_file(tmp_path: Path, fails: bool) -> None:
    """The file stays until the folder is complete. If the save fails, it keeps its name."""
    path = tmp_path / "last.ckpt"
    save_file(path, BackgroundSync(), 1)

    def work(ranks: Ranks, write: Callable[[Path], object]) -> None:
        with sealed_by_all(
            str(path), ranks=ranks, publishes=True, replaces_file=file_moved_aside
        ) as folder:
            assert number_in(path) == 1
            write(folder)

    if fails:
        with pytest.raises(OSError, match="Input/output"):
            run_ranks(1, lambda ranks: work(ranks, lambda _: fail()))
        assert number_in(path) == 1
    else:
        run_ranks(1, lambda ranks: work(ranks, lambda folder: (folder / "a").write_text("x")))
        assert holdfast.check(path) == []
    assert names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("entries", [{}, {"optimizer_states": []}])
def test_a_file_of_weights_alone_is_no_checkpoint_to_resume_from(
    tmp_path: Path, entries: dict[str, Any]
) -> None:
    """Method: beside `last`, a newer file of a `ModelCheckpoint` with `save_weights_only`, and one
    that has optimizer states too. `last` takes the newest full checkpoint."""
    state = {"pytorch-lightning_version": "2.6.6", "state_dict": {"w": torch.zeros(3)}}
    torch.save({**state, "optimizer_states": [{"lr": 0.1}]}, tmp_path / "last.ckpt")
    torch.save({**state, **entries}, tmp_path / "best.ckpt")
    os.utime(tmp_path / "last.ckpt", (1, 1))
    chosen = "best.ckpt" if entries else "last.ckpt"
    assert good_at(tmp_path / "last.ckpt") == tmp_path / chosen
