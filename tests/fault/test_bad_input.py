"""Mistakes of users: each gets a clear message and the documented exit status, and loses
nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import holdfast
from runs import kill_all, start, train, wait_for_step

FOUR = (
    "--training.steps",
    "4",
    "--checkpoint.interval",
    "2",
    "--checkpoint.no-last_save_model_only",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a run of 4 steps, which has saved steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    done = train(*FOUR, cwd=folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """Copy that folder, so that a test may break it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(folder: Path, *arguments: str, ranks: int = 1, status: int) -> str:
    """Run, and check that it ends as after a user's mistake. Returns its output."""
    ended = train(*FOUR, *arguments, ranks=ranks, cwd=folder)
    assert ended.returncode == status, ended.stdout
    assert "Traceback" not in ended.stdout, ended.stdout
    assert ended.stdout.count("error: ") == 1, ended.stdout
    return ended.stdout


def good_steps(folder: Path) -> list[int]:
    """Return the steps in `folder` whose every tensor is read and matches its checksums."""
    found = []
    for path in (folder / "outputs/checkpoint").glob("step-*"):
        checkpoint = holdfast.open(path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
        found.append(int(path.name.removeprefix("step-")))
    return sorted(found)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/checkpoint").write_text("not a folder")
    said = refused(tmp_path, status=9)
    assert f"`{tmp_path}/outputs/checkpoint`" in said
    assert "hint: a file has the name of the folder" in said


@pytest.mark.parametrize("key", ["job.dump_folder", "checkpoint.folder"])
def test_a_url_where_a_folder_belongs(key: str, tmp_path: Path) -> None:
    """G16. Method: `ftp://...` in either setting; no folder `ftp:` is made, not even for data."""
    said = refused(tmp_path, f"--{key}", "ftp://host/run", status=2)
    assert "is a URL" in said
    assert not [*tmp_path.rglob("ftp:*")]


@pytest.mark.parametrize("key", ["job.dump_folder", "checkpoint.folder"])
def test_a_home_that_no_shell_has_spelled_out(key: str, tmp_path: Path) -> None:
    """G8. Method: `~` in either setting; no folder of that name is made."""
    said = refused(tmp_path, f"--{key}", "~/run", status=2)
    assert "starts with `~`" in said
    assert not [*tmp_path.rglob("~")]


def test_a_step_that_does_not_exist(run_folder: Path) -> None:
    said = refused(run_folder, "--checkpoint.load_step", "3", status=4)
    assert "step-3` does not exist" in said
    assert "hint: steps there: 2, 4" in said
    assert good_steps(run_folder) == [2, 4]


def test_a_checkpoint_of_another_model(run_folder: Path) -> None:
    """G6. Method: all differences are listed, on two ranks as on one; the steps are unchanged."""
    (run_folder / "corpus").mkdir()
    assets = tokenizer_with(300, run_folder)
    arguments = ("--model.hf_assets_path", str(assets), "--training.steps", "6")
    for ranks in (1, 2):
        said = refused(
            run_folder,
            *arguments,
            "--checkpoint.exclude_from_loading",
            "dataloader",
            ranks=ranks,
            status=6,
        )
        for name in ("tok_embeddings.weight", "output.weight"):
            assert re.search(
                rf"`{name}` has shape \[\d+, 256\] in the checkpoint, expected \[300, 256\]", said
            )
        assert "nothing was changed" in said
    assert good_steps(run_folder) == [2, 4]


def tokenizer_with(size: int, folder: Path) -> Path:
    """Write assets whose tokenizer has that many tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "assets").mkdir()
    made.save(str(folder / "assets/tokenizer.json"))
    return folder / "assets"


def test_an_excluded_part_that_does_not_exist(run_folder: Path) -> None:
    said = refused(run_folder, "--checkpoint.exclude_from_loading", "optimiser", status=2)
    assert "`optimiser`, which is no component" in said
    assert "did you mean `optimizer`?" in said


def test_a_damaged_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text('[training]\nsteps = "many\n')
    said = refused(tmp_path, "--job.config_file", "broken.toml", status=2)
    assert "broken.toml" in said
    assert "line 2" in said


def test_degrees_that_do_not_fit_the_world_size(tmp_path: Path) -> None:
    said = refused(tmp_path, "--parallelism.tensor_parallel_degree", "3", ranks=2, status=2)
    assert "tensor_parallel_degree" in said
    assert "3" in said
    assert "2" in said


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    """Method: the error of the second run names the host and process of the first, which
    continues."""
    first = start("--training.steps", "500", "--checkpoint.interval", "2", ranks=1, cwd=tmp_path)
    try:
        wait_for_step(tmp_path / "outputs", 3)
        said = refused(tmp_path, status=5)
        assert "is in use by another run" in said
        assert f"host {os.uname().nodename}, pid {first.pid}, since " in said
        wait_for_step(tmp_path / "outputs", 8)
    finally:
        kill_all(first)
    # The lock of a dead run does not block the next one.
    done = train("--training.steps", "10", "--checkpoint.interval", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "resumed from step" in done.stdout


def test_a_damaged_step_is_passed_over_and_an_explicit_one_is_not(run_folder: Path) -> None:
    """G3, G4. Method: one flipped bit in the newest step."""
    data = run_folder / "outputs/checkpoint/step-4/__0_0.distcp"
    with data.open("r+b") as file:
        file.seek(data.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    said = refused(run_folder, "--checkpoint.load_step", "4", "--training.steps", "6", status=7)
    assert "__0_0.distcp`: block" in said
    assert f"hint: `holdfast verify {data.parent}` lists what is damaged; `load_step = -1`" in said
    passed = train(*FOUR, "--training.steps", "6", cwd=run_folder)
    assert passed.returncode == 0, passed.stdout
    assert "passed over step 4: " in passed.stdout
    assert "resumed from step 2" in passed.stdout


def test_every_step_damaged(run_folder: Path) -> None:
    """G4. Method: the error lists the damage of each step; no step is deleted."""
    for step in (2, 4):
        (run_folder / f"outputs/checkpoint/step-{step}/.metadata").unlink()
    said = refused(run_folder, "--training.steps", "6", status=4)
    for step in (2, 4):
        assert f"step {step}: " in said
        assert (run_folder / f"outputs/checkpoint/step-{step}").is_dir()
    assert "`.metadata` is missing" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with room for about one step."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=90m", "tmpfs", str(disk))
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """G7, G11. Method: the second step does not fit. The message has the bytes needed and free, and
    appears once for two ranks. The first step is unchanged, and nothing of the second is left."""
    folder = ("--checkpoint.folder", str(small_disk / "checkpoint"))
    said = refused(tmp_path, *folder, ranks=2, status=9)
    assert re.search(r"step-4` needs [\d.]+ MB, [\d.]+ MB are free", said)
    assert "hint: free some space (df -h), or use another disk, or lower `checkpoint.keep" in said
    left = {path.name for path in (small_disk / "checkpoint").iterdir()}
    assert left == {".lock", "step-2"}
    holdfast.open(small_disk / "checkpoint/step-2").read("output.weight")


def test_a_folder_that_cannot_be_written(small_disk: Path, tmp_path: Path) -> None:
    """G11. Method: a read-only file system, since permissions do not stop root."""
    mount("-o", "remount,ro", str(small_disk))
    said = refused(tmp_path, "--checkpoint.folder", str(small_disk / "checkpoint"), status=9)
    assert f"cannot make the folder `{small_disk}/checkpoint`" in said
    assert "hint: the file system is mounted read-only" in said
