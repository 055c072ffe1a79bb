"""Resuming if the newest step cannot be read, is a copy, or is replaced while it is read."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from checkpoints import copy_step
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.format.names import mark_of


def manager(folder: Path, **settings: Any) -> CheckpointManager:
    config = CheckpointConfig(enable=True, **({"interval": 1, "keep_latest_k": 0} | settings))
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    return CheckpointManager(folder, model=model, optimizers=optimizer, config=config)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with steps 1 and 2."""
    with manager(tmp_path / "run") as held:
        held.save(1)
        held.save(2)
    return tmp_path / "run"


def marks(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if mark_of(path.name) is not None]


def failing(real: Callable[..., Any], path: Path, number: int) -> Callable[..., Any]:
    """A wrapper of `real`, a system call that reads: it fails on one file."""

    def call(file: int, *more: Any) -> Any:
        if Path(f"/proc/self/fd/{file}").readlink() == path:
            raise OSError(number, os.strerror(number))
        return real(file, *more)

    return call


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_step_that_cannot_be_read_is_passed_over_without_a_mark(
    number: int, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """G4. Method: reads of the newest step's data fail. The run resumes from the step before, logs
    it, and leaves no mark: the next start takes the newest again. `load_step` raises."""
    data = run / "step-2" / "__0_0.distcp"
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "holdfast"):
        for call in ("pread", "preadv"):
            patch.setattr(os, call, failing(getattr(os, call), data, number))
        with manager(run) as held:
            assert held.load() == 1
        with manager(run) as held, pytest.raises(holdfast.StorageError, match=r"step-2"):
            held.load(2)
    assert "passed over step 2" in caplog.text
    assert os.strerror(number) in caplog.text
    assert marks(run) == []
    with manager(run) as held:
        assert held.load() == 2


def test_a_run_does_not_start_over_if_no_step_can_be_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4. Method: reads of all data fail; the error lists every step."""

    def call(file: int, *_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", call)
        with manager(run) as held, pytest.raises(holdfast.NotFoundError) as raised:
            held.load()
    assert "step 1:" in raised.value.what
    assert "step 2:" in raised.value.what


def test_the_error_about_a_missing_step_lists_the_existing_ones(run: Path) -> None:
    """G4. Method: two steps, another requested; and no step at all."""
    with manager(run) as held, pytest.raises(holdfast.NotFoundError) as raised:
        held.load(7)
    assert "steps there: 1, 2" in (raised.value.hint or "")
    with manager(run / "empty") as held, pytest.raises(holdfast.NotFoundError) as raised:
        held.load(7)
    assert "steps there: none" in (raised.value.hint or "")


def test_a_copy_of_a_checkpoint_is_not_loaded_under_its_new_number(run: Path) -> None:
    """G4, G16. Method: `load_step` of a copy, then of the step itself. Retention keeps two and the
    step that the run resumed from, and ignores the copy."""
    shutil.copytree(run / "step-1", run / "step-40")
    with manager(run) as held:
        with pytest.raises(holdfast.MismatchError, match="is not step 40: it holds step 1"):
            held.load(40)
        assert held.load(1) == 1
    with manager(run, keep_latest_k=2) as held:
        assert held.load() == 2
        for step in (3, 4, 5):
            held.save(step)
    assert {path.name for path in run.glob("step-*")} == {"step-2", "step-4", "step-40", "step-5"}


def test_a_reader_of_a_live_run_tries_again_if_a_step_was_deleted(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """G4: a step that is deleted or replaced while it is loaded is not damaged. Method: it is
    deleted, and newer ones appear, as its data is opened."""
    real, seen = os.preadv, list[int]()

    def call(file: int, *more: Any) -> Any:
        if not seen:
            seen.append(file)
            copy_step(run / "step-2", 3)
            shutil.rmtree(run / "step-2")
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(file, *more)

    monkeypatch.setattr(os, "preadv", call)
    with caplog.at_level(logging.WARNING, "holdfast"), manager(run, load_only=True) as held:
        assert held.load() == 3
    assert seen
    assert "passed over" not in caplog.text
    assert marks(run) == []


def test_a_load_of_a_checkpoint_that_is_replaced_gives_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G2: never a mix. Method: the checkpoint is saved again as its data is opened; an object that
    had it open raises an error that says so."""
    path = tmp_path / "c"
    holdfast.save(path, {"w": torch.ones(300), "n": 1})
    opened = holdfast.open(path)
    real, seen = os.preadv, list[int]()

    def call(file: int, *more: Any) -> Any:
        if not seen:
            seen.append(file)
            holdfast.save(path, {"w": torch.full((300,), 2.0), "n": 2}, overwrite=True)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(file, *more)

    monkeypatch.setattr(os, "preadv", call)
    state: dict[str, Any] = {"w": torch.zeros(300), "n": 0}
    holdfast.load(path, state)
    assert seen
    assert state["n"] == 2
    assert torch.equal(state["w"], torch.full((300,), 2.0))
    with pytest.raises(holdfast.NotFoundError, match="replaced or deleted since it was opened"):
        opened.read("w")
    assert torch.equal(holdfast.open(path).read("w"), torch.full((300,), 2.0))


def test_damage_without_a_replacement_is_marked(run: Path) -> None:
    """G3. Method: a flipped byte, nothing replaced: one error, and a mark."""
    data = bytearray((run / "step-2" / "__0_0.distcp").read_bytes())
    data[len(data) // 3] ^= 1
    (run / "step-2" / "__0_0.distcp").write_bytes(data)
    with manager(run) as held:
        assert held.load() == 1
    assert marks(run) == [".damaged-step-2"]
