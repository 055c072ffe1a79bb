"""Overwriting replaces one checkpoint or one export, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.recording import tree_at
from torch import nn

import holdfast
from checkpoints import save_safetensors, save_stock, save_torch
from hf_folders import LLAMA, hf_tensors, save_folder
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.cli.main import main
from holdfast.format.names import LOCK
from holdfast.storage.local import LocalStore

REFUSED: dict[str, Callable[[Path], None]] = {}
ALLOWED: dict[str, Callable[[Path], None]] = {}

STATE = {"model": {"w": torch.ones(9)}}


def refused(make: Callable[[Path], None]) -> Callable[[Path], None]:
    REFUSED[make.__name__] = make
    return make


def allowed(make: Callable[[Path], None]) -> Callable[[Path], None]:
    ALLOWED[make.__name__] = make
    return make


def run_in(path: Path) -> CheckpointManager:
    config = CheckpointConfig(enable=True, interval=1)
    held = CheckpointManager(path, model=nn.Linear(2, 2), config=config)
    held.save(1)
    return held


@refused
def a_run_that_has_ended(path: Path) -> None:
    with run_in(path):
        assert path.is_dir()


@refused
def a_run_without_its_lock(path: Path) -> None:
    a_run_that_has_ended(path)
    (path / LOCK).unlink()


@refused
def a_run_that_has_saved_nothing(path: Path) -> None:
    path.mkdir()
    (path / LOCK).touch()


@refused
def a_folder_of_checkpoints_of_other_names(path: Path) -> None:
    for name in ("best", "last"):
        holdfast.save(path / name, STATE)


@refused
def a_folder_with_an_attempt(path: Path) -> None:
    (path / ".attempt-step-1-0123abcd").mkdir(parents=True)


@refused
def a_folder_of_other_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years")


@refused
def a_checkpoint_with_a_thesis_in_it(path: Path) -> None:
    holdfast.save(path, STATE)
    (path / "thesis.tex").write_text("years")


@refused
def a_checkpoint_with_a_run_in_it(path: Path) -> None:
    holdfast.save(path, STATE)
    a_run_that_has_ended(path / "finetune")


@refused
def a_checkpoint_with_folders_in_it(path: Path) -> None:
    holdfast.save(path, STATE)
    (path / "notes" / "deep").mkdir(parents=True)


@refused
def a_web_application(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"name": "mine", "start_url": "/"}))
    (path / "index.html").write_text("<p>years")


@refused
def shards_with_a_thesis(path: Path) -> None:
    save_safetensors(path)
    (path / "sharded").mkdir()
    (path / "sharded" / "thesis.tex").write_text("years")


@refused
def a_repository_with_weights(path: Path) -> None:
    save_safetensors(path)
    (path / ".git").mkdir()
    (path / ".git" / "HEAD").write_text("ref")


@refused
def downloads_with_weights(path: Path) -> None:
    save_safetensors(path)
    (path / "thesis.pdf").write_text("years")


@refused
def a_file(path: Path) -> None:
    path.write_text("years")


@refused
def a_file_of_weights(path: Path) -> None:
    torch.save({"w": torch.ones(3)}, path)


@refused
def an_empty_folder_name_in_a_folder(path: Path) -> None:
    (path / "empty").mkdir(parents=True)


@allowed
def one_checkpoint(path: Path) -> None:
    holdfast.save(path, STATE)


@allowed
def a_damaged_one(path: Path) -> None:
    holdfast.save(path, STATE)
    (path / "manifest.json").write_bytes(b"\0" * 100)


@allowed
def one_that_has_lost_its_indices(path: Path) -> None:
    holdfast.save(path, STATE)
    (path / "manifest.json").unlink()
    (path / ".metadata").unlink()


@allowed
def one_of_stock_dcp(path: Path) -> None:
    save_stock(path)


@allowed
def an_export(path: Path) -> None:
    save_folder(path, LLAMA, hf_tensors(LLAMA))
    (path / "merges.txt").write_text("a b")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "x.jinja").write_text("x")


@allowed
def an_empty_folder(path: Path) -> None:
    path.mkdir()


@allowed
def one_with_files_of_tools(path: Path) -> None:
    holdfast.save(path, STATE)
    for name in (".nfs00000000012d6a8300000001", ".DS_Store", "._.DS_Store", "Thumbs.db"):
        (path / name).write_bytes(b"")


@allowed
def an_export_with_its_shards(path: Path) -> None:
    """TorchTitan leaves the weights that it has consolidated."""
    save_safetensors(path)
    (path / "sharded").mkdir()
    (path / "sharded" / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")


@allowed
def one_that_stands_aside(path: Path) -> None:
    holdfast.save(path, STATE)
    path.rename(path.with_name(f".replaced-{path.name}-0123abcd"))


def overwrite_by_save(path: Path) -> int:
    try:
        holdfast.save(path, {"model": {"w": torch.zeros(9)}}, overwrite=True)
    except holdfast.ExistsError as error:
        return error.exit_status
    return 0


def overwrite_by_convert(path: Path) -> int:
    source = path.parent.parent / "source"
    if not source.exists():
        holdfast.save(source, {"model": {"w": torch.zeros(9)}})
    return main(["convert", str(source), str(path), "--to", "dcp", "--overwrite"])


def overwrite_by_a_run(path: Path) -> int:
    """Save a step again, in a run."""
    with CheckpointManager(
        path.parent,
        model=nn.Linear(2, 2),
        config=CheckpointConfig(enable=True, interval=1, keep_latest_k=0),
    ) as held:
        try:
            held.save(5)
        except holdfast.ExistsError as error:
            return error.exit_status
    return 0


RENAMED = {"a_checkpoint_with_a_thesis_in_it", "a_checkpoint_with_folders_in_it"}
"""Folders that a run renames when it saves the step again."""

WAYS = [overwrite_by_save, overwrite_by_convert, overwrite_by_a_run]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_only_a_checkpoint_is_overwritten(
    name: str, way: Callable[[Path], int], tmp_path: Path
) -> None:
    """G16. Method: each kind of file or folder under the name, by each way to overwrite it; every
    file of it is unchanged."""
    path = tmp_path / "run" / "step-5"
    path.parent.mkdir()
    REFUSED[name](path)
    before = path.read_bytes() if path.is_file() else tree_at(path)
    if way is overwrite_by_a_run and name in RENAMED:
        assert way(path) == 0
        assert holdfast.check(path) == []
        (aside,) = path.parent.glob("step-5.kept-*")
        assert tree_at(aside) == before
        return
    assert way(path) == holdfast.ExistsError.exit_status
    assert (path.read_bytes() if path.is_file() else tree_at(path)) == before
    left = {one.name for one in path.parent.iterdir()} - {LOCK}
    assert left == {path.name}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALLOWED)
def test_any_checkpoint_can_be_overwritten(
    name: str, way: Callable[[Path], int], tmp_path: Path
) -> None:
    """G16. Method: each kind of checkpoint, good or damaged; the new one loads, and nothing else is
    left."""
    path = tmp_path / "run" / "step-5"
    path.parent.mkdir()
    ALLOWED[name](path)
    assert way(path) == 0
    assert holdfast.open(path).names()
    left = {one.name for one in path.parent.iterdir()} - {LOCK}
    assert left == {path.name}


@pytest.mark.parametrize("way", [overwrite_by_save, overwrite_by_convert])
def test_a_step_of_a_live_run_is_not_overwritten_by_others(
    way: Callable[[Path], int], tmp_path: Path
) -> None:
    """G16. Method: the run holds its folder; other names in it can be overwritten."""
    holdfast.save(tmp_path / "run" / "best", STATE)
    with run_in(tmp_path / "run"):
        before = tree_at(tmp_path / "run" / "step-1")
        assert way(tmp_path / "run" / "step-1") == holdfast.ExistsError.exit_status
        assert tree_at(tmp_path / "run" / "step-1") == before
        assert way(tmp_path / "run" / "best") == 0
    assert way(tmp_path / "run" / "step-1") == 0


def test_overwriting_a_link_keeps_its_target(tmp_path: Path) -> None:
    """G16. Method: `best`, a link to a step."""
    holdfast.save(tmp_path / "step-1", STATE)
    (tmp_path / "best").symlink_to("step-1")
    before = tree_at(tmp_path / "step-1")
    assert overwrite_by_save(tmp_path / "best") == 0
    assert not (tmp_path / "best").is_symlink()
    assert tree_at(tmp_path / "step-1") == before


@pytest.mark.parametrize("to", ["dcp", "hf", "torch"])
def test_a_conversion_never_overwrites_its_source(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G16. Method: the source itself, by its path and by a link; the folder around it; a path
    inside of it; the folder of assets; `.pt` files, onto themselves and beside."""
    home = tmp_path / "home"
    source = save_folder(home / "hf", LLAMA, hf_tensors(LLAMA))
    (home / "siblings").mkdir()
    (home / "siblings" / "thesis.tex").write_text("years")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "home-link").symlink_to(home)
    before = tree_at(home)
    targets = [source, home, source / "inside", tmp_path / "home-link" / "hf", tmp_path]
    for target in targets:
        assert main(["convert", str(source), str(target), "--to", to, "--overwrite"]) == 2, target
        assert tree_at(home) == before
    assert main(["convert", str(tmp_path / "link"), str(source), "--to", to, "--overwrite"]) == 2
    assets = tmp_path / "assets"
    shutil.copytree(source, assets)
    arguments = ["convert", str(source), str(assets), "--to", to, "--hf-assets", str(assets)]
    assert main([*arguments, "--overwrite"]) == 2
    assert tree_at(home) == before
    assert "the conversion reads" in capsys.readouterr().err


def test_a_file_replaces_only_a_file_and_atomically(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G14, G16. Method: `.pt` files onto each other, a text, a folder, a link, and the source."""
    source = save_torch(tmp_path / "source.pt")
    target = tmp_path / "target.pt"
    convert = ["convert", str(source), str(target), "--overwrite"]
    assert main(convert) == 0
    assert main(convert) == 0
    assert main(["convert", str(source), str(source), "--overwrite"]) == 2
    target.write_text("years")
    assert main(convert) == 5
    assert target.read_text() == "years"
    target.unlink()
    holdfast.save(target, STATE)
    assert main(convert) == 5
    assert (target / "manifest.json").exists()
    shutil.rmtree(target)
    target.symlink_to(source)
    before = source.read_bytes()
    assert main(convert) == 0
    assert not target.is_symlink()
    assert source.read_bytes() == before
    assert main(["convert", str(source), str(target)]) == 5
    capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == {"source.pt", "target.pt"}


def test_retention_keeps_a_step_whose_folder_contains_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G16. Method: a run trains in the folder of a step. Retention logs that it keeps the step, and
    deletes the others; `prune` reports the same."""
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=2)
    with CheckpointManager(tmp_path, model=nn.Linear(2, 2), config=config) as held:
        held.save(1)
        with run_in(tmp_path / "step-1" / "more"):
            for step in (2, 3, 4, 5):
                held.save(step)
    assert {1, 4, 5} <= {*Catalog(LocalStore(tmp_path)).steps()}
    assert (tmp_path / "step-1" / "more" / "step-1" / "manifest.json").exists()
    assert "a run, is in it" in caplog.text
    assert main(["prune", str(tmp_path), "--keep-latest-k", "1", "--damaged"]) == 0
    assert (tmp_path / "step-1" / "more" / "step-1" / "manifest.json").exists()


def test_prune_deletes_no_folder_that_only_has_the_name_of_a_step(tmp_path: Path) -> None:
    """G16. Method: folders named as steps with other files; `--damaged` deletes the damaged step
    beside them, and keeps those."""
    with CheckpointManager(
        tmp_path,
        model=nn.Linear(2, 2),
        optimizers=torch.optim.SGD(nn.Linear(2, 2).parameters()),
        config=CheckpointConfig(enable=True, interval=1, last_save_model_only=False),
    ) as held:
        for step in (1, 2, 3):
            held.save(step)
    for step in (7, 8):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "step-7" / "thesis.tex").write_text("years")
    (tmp_path / "step-8" / "__0_0.distcp").write_text("torn")
    arguments: list[Any] = ["prune", tmp_path, "--keep-latest-k", "2", "--damaged"]
    assert main([os.fspath(one) for one in arguments]) in (0, 2)
    assert (tmp_path / "step-7" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("way", ["save", "manager"])
def test_an_interrupted_save_keeps_no_lock(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G16. Method: Ctrl-C during the sync of a checkpoint that is being replaced, in a process that
    continues, as a notebook's does, and keeps the traceback. The same save then succeeds, and
    cleans up after the first."""
    model, real = nn.Linear(2, 2), os.fsync
    config = CheckpointConfig(enable=True, interval=1)
    path = tmp_path / "step-1"

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with CheckpointManager(tmp_path, model=model, config=config) as held:

        def save() -> None:
            if way == "manager":
                held.save(1)
            else:
                holdfast.save(tmp_path / "c", {"model": model}, overwrite=True)

        save()
        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept:
            save()
        monkeypatch.setattr(os, "fsync", real)
        save()
        assert kept.value is not None
    assert holdfast.open(path if way == "manager" else tmp_path / "c").names()
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".attempt")]
