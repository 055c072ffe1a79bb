"""`holdfast prune`: its plan, the folders that it removes, and folders that always stay."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from checkpoints import copy_step, save_safetensors, save_step
from holdfast.catalog.marks import mark_damaged
from holdfast.cli.main import main
from holdfast.format.names import LOCK
from holdfast.planning import index
from holdfast.storage.local import LocalStore
from holdfast.testing.stores import put


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good checkpoints."""
    home = tmp_path_factory.mktemp("saved")
    save_step(home / "steps", 10)
    for step in (20, 30, 40, 50, 60):
        copy_step(home / "steps/step-10", step)
    return home / "steps"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main(["prune", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


def test_a_checkpoint_stays_if_any_rule_keeps_it(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G5. Method: keep the newest three, and every multiple of 20 steps; first `--dry-run`, which
    changes nothing."""
    before = there(steps)
    rules = ("--keep-latest-k", "3", "--keep-every-n-steps", "20")
    status, said, err = run(capsys, steps, *rules, "--dry-run")
    assert (status, err) == (0, "")
    assert there(steps) == before
    assert "would remove 2 folders" in said
    rows = {line.split()[0]: line for line in said.splitlines()[1:-1]}
    assert "remove  no rule keeps it" in rows["step-10"]
    assert "keep    every 20 steps" in rows["step-20"]
    assert "latest 3" in rows["step-60"]
    status, said, _ = run(capsys, steps, *rules)
    assert (status, "removing 2 folders" in said) == (0, True)
    assert there(steps) == ["step-20", "step-40", "step-50", "step-60"]
    assert run(capsys, steps, *rules)[0] == 0


def test_without_a_rule_only_leftovers_of_killed_saves_are_removed(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G5. Method: an attempt, an interrupted removal, and somebody else's folder."""
    before = there(steps)
    (steps / ".attempt-step-70-0123abcd").mkdir()
    (steps / ".attempt-step-70-0123abcd/__0_0.distcp").write_bytes(bytes(100))
    (steps / ".removing-step-5-0123abcd").mkdir()
    (steps / "old-step-7-keep").mkdir()
    found: dict[str, Any] = json.loads(run(capsys, steps, "--json")[1])
    going = [one["name"] for one in found["decisions"] if not one["stays"]]
    assert going == [".attempt-step-70-0123abcd", ".removing-step-5-0123abcd"]
    assert there(steps) == sorted([*before, "old-step-7-keep"])


def test_pinned_and_damaged_checkpoints_and_the_newest_two_stay(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G5. Method: one pinned, one truncated, one marked; then `--damaged`."""
    put(LocalStore(steps), ".pinned-step-10", b"")
    (steps / "step-20/__0_0.distcp").write_bytes(b"")
    mark_damaged(LocalStore(steps), 60, "a block")
    run(capsys, steps, "--keep-latest-k", "1")
    assert [name for name in there(steps) if not name.startswith(".")] == [
        "step-10",
        "step-20",
        "step-40",
        "step-50",
        "step-60",
    ]
    said = run(capsys, steps, "--damaged")[1]
    assert "no rule given" in said
    assert there(steps) == [".pinned-step-10", "step-10", "step-40", "step-50"]


def test_a_hugging_face_folder_never_counts_as_damaged(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G5. Method: a folder as `last_save_in_hf` writes it, and a folder of exports."""
    save_safetensors(steps / "step-70")
    save_safetensors(steps / "hf/step-70")
    said = run(capsys, steps, "--keep-latest-k", "2", "--damaged")[1]
    assert "a Hugging Face folder" in said
    assert there(steps) == ["hf", "step-50", "step-60", "step-70"]
    assert main(["doctor", str(steps)]) == 0
    assert "no problems" in capsys.readouterr().out


def test_damaged_checkpoints_stay_if_there_is_no_good_one(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G5. Method: truncate every checkpoint."""
    for step in steps.iterdir():
        (step / "__0_0.distcp").write_bytes(b"")
    before = there(steps)
    status, _, err = run(capsys, steps, "--damaged", "--keep-latest-k", "2")
    assert (status, "all there is" in err) == (2, True)
    assert run(capsys, steps, "--keep-latest-k", "2")[0] == 0
    assert there(steps) == before


def test_prune_changes_nothing_while_a_run_holds_the_lock(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G5. Method: hold the lock as a run does; `--dry-run` still works."""
    before = there(steps)
    with LocalStore(steps).lock(LOCK, "host here, pid 1"):
        status, _, err = run(capsys, steps, "--keep-latest-k", "2")
        assert (status, "held by this process already: host here, pid 1" in err) == (5, True)
        assert run(capsys, steps, "--keep-latest-k", "2", "--dry-run")[0] == 0
    assert there(steps) == before


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("missing",), 4),
        (("steps/step-10",), 4),
        (("memory://steps",), 2),
        (("steps", "--keep-latest-k", "0"), 2),
        (("steps", "--keep-best-k", "-1"), 2),
    ],
)
def test_a_mistake_removes_nothing(
    steps: Path,
    arguments: tuple[str, ...],
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = there(steps)
    monkeypatch.chdir(steps.parent)
    assert run(capsys, *arguments)[0] == status
    assert there(steps) == before


@pytest.mark.parametrize("what", ["step-60", "step-60/__0_0.distcp"])
def test_a_checkpoint_on_a_failing_disk_is_not_removed_as_damaged(
    what: str, steps: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """G16. Method: system calls on a folder or a file fail with an I/O error; `--damaged` leaves
    the checkpoint, which is undamaged once the disk works again."""
    refused, real = str(steps / what), {name: getattr(os, name) for name in ("open", "stat")}

    def failing(name: str, path: Any, *more: Any, **named: Any) -> Any:
        if isinstance(path, str) and path.startswith(refused):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real[name](path, *more, **named)

    before = there(steps)
    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, partial(failing, name))
        assert run(capsys, steps, "--damaged")[0] == 0
    assert there(steps) == before


def test_a_checkpoint_with_files_of_the_user_stays_and_the_first_is_named(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G16. Method: files, folders and a dot file in checkpoints that no rule keeps, one of them
    damaged; beside them files that a file system and a file manager leave."""
    (steps / "step-10/notes").write_text("mine")
    (steps / "step-20/sub").mkdir()
    (steps / "step-20/sub/data").write_text("mine")
    (steps / "step-30/.notes").write_text("mine")
    (steps / "step-30/manifest.json").write_bytes(b"")
    for name in (".nfs0000000000c0ffee00000001", ".DS_Store"):
        (steps / "step-40" / name).write_bytes(b"")
    status, said, _ = run(capsys, steps, "--keep-latest-k", "2", "--damaged")
    assert status == 0
    rows = {line.split()[0]: line for line in said.splitlines()[1:-1]}
    assert "keep    it holds files that are no part of a checkpoint: `notes`" in rows["step-10"]
    assert "keep    it holds folders: `sub/`" in rows["step-20"]
    assert "`.notes`" in rows["step-30"]
    assert "remove  no rule keeps it" in rows["step-40"]
    assert there(steps) == ["step-10", "step-20", "step-30", "step-50", "step-60"]
    assert (steps / "step-20/sub/data").read_text() == "mine"


def test_no_good_checkpoint_is_deleted_for_one_with_a_damaged_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4, G5. Method: a flipped byte in `index.bin` of the newest two of four checkpoints. `list`
    and `doctor` name them, the rules do not count them, and the command that `doctor` prints
    deletes them."""
    monkeypatch.setattr(index, "LISTED_CHUNKS_MAX", 0)
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    for step in (3, 4):
        data = bytearray((tmp_path / f"step-{step}/index.bin").read_bytes())
        data[100] ^= 1
        (tmp_path / f"step-{step}/index.bin").write_bytes(data)
    assert main(["list", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["state"] for one in found["checkpoints"]] == ["good", "good", "damaged", "damaged"]
    assert found["resume"] == 2
    assert run(capsys, tmp_path, "--keep-latest-k", "2")[0] == 0
    assert there(tmp_path) == ["step-1", "step-2", "step-3", "step-4"]
    assert main(["doctor", str(tmp_path), "--json"]) == 7
    mends = {one["mend"] for one in json.loads(capsys.readouterr().out)["troubles"]}
    assert mends == {f"holdfast prune {tmp_path} --damaged"}
    assert run(capsys, tmp_path, "--damaged")[0] == 0
    assert there(tmp_path) == ["step-1", "step-2"]


def test_an_attempt_that_another_process_holds_stays(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G16. Method: two attempts, one of them held as a conversion holds its own."""
    store = LocalStore(steps)
    for number in (1, 2):
        store.make_folder(f".attempt-step-0-0000000{number}")
    with store.hold(".attempt-step-0-00000001"):
        status, said, _ = run(capsys, steps)
        assert status == 0
        assert "keep    another process is at work on it" in said
        assert ".attempt-step-0-00000001" in there(steps)
    assert ".attempt-step-0-00000002" not in there(steps)
    assert run(capsys, steps)[0] == 0
    assert not [name for name in there(steps) if name.startswith(".attempt")]
