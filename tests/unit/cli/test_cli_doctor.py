"""`holdfast doctor`: each problem of a folder, and the command that fixes it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import holdfast
from checkpoints import save_step
from holdfast.catalog.marks import mark_damaged
from holdfast.cli import doctor
from holdfast.cli.main import main
from holdfast.errors import StorageError
from holdfast.format.names import LOCK
from holdfast.storage.local import LocalStore


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        save_step(home / "steps", step)
    return home / "steps"


def damage_optimizer(path: Path) -> None:
    """Flip a bit of the optimizer's only tensor."""
    (chunk,) = holdfast.open(path).manifest.tensors["optimizer.moment"].chunks
    data = bytearray((path / chunk.file).read_bytes())
    data[(chunk.data_offset or 0) + 5] ^= 1
    (path / chunk.file).write_bytes(data)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main(["doctor", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def troubles(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the troubles by `where`."""
    found = json.loads(run(capsys, folder, "--json")[1])
    return {trouble["where"]: trouble for trouble in found["troubles"]}


def test_doctor_finds_no_problem_in_the_folder_of_a_finished_run(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, err = run(capsys, steps, "--verify")
    assert (status, err) == (0, "")
    assert said == f"{steps}: 3 checkpoints, a resume takes step 3\n  no problems\n"


def test_doctor_lists_damaged_checkpoints_and_its_command_removes_them(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: a missing file; then a flipped bit in another checkpoint, which only `--verify`
    finds; without it `doctor` says that no data was read."""
    (steps / "step-3/__1_0.distcp").unlink()
    status, said, _ = run(capsys, steps)
    assert status == 7
    assert "a resume skips it, and takes step 2" in said
    found = troubles(capsys, steps)
    assert found.keys() == {"step-3"}
    assert found["step-3"]["mend"] == f"holdfast prune {steps} --damaged"
    mend(found["step-3"])
    status, said, _ = run(capsys, steps)
    assert (status, "step-3" in said) == (0, False)
    data = bytearray((steps / "step-2/__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (steps / "step-2/__0_0.distcp").write_bytes(data)
    said = run(capsys, steps)[1]
    assert "damaged: step-2" not in said
    assert f"no data was read: holdfast doctor {steps} --verify reads all of it" in said
    said = run(capsys, steps, "--verify", "--json")[1]
    (trouble,) = json.loads(said)["troubles"]
    assert trouble["where"] == "step-2"
    mend(trouble)
    assert run(capsys, steps, "--verify")[1].endswith("takes step 1\n  no problems\n")


def mend(trouble: dict[str, Any]) -> None:
    """Run the command of a trouble in a shell."""
    script = f'holdfast() {{ {sys.executable} -m holdfast.cli "$@"; }}\n{trouble["mend"]}'
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)


def test_without_a_good_checkpoint_the_command_saves_the_model(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: the optimizer of the only checkpoint is damaged: the model becomes a seed
    elsewhere; then its index is deleted, which no command repairs."""
    for step in (1, 2):
        shutil.rmtree(steps / f"step-{step}")
    damage_optimizer(steps / "step-3")
    assert run(capsys, steps, "--verify")[0] == 7
    found = json.loads(run(capsys, steps, "--verify", "--json")[1])
    assert found["resume"] is None
    mend(found["troubles"][0])
    seed = holdfast.open(f"{steps}-rescued/step-0")
    assert all(name.startswith("model.") for name in seed.names())
    (steps / "step-3/manifest.json").unlink()
    status, said, _ = run(capsys, steps)
    assert (status, "no command repairs it: restore it from a copy" in said) == (7, True)
    assert troubles(capsys, steps)["step-3"]["mend"] is None


def test_the_command_for_a_marked_checkpoint_deletes_the_mark_if_it_is_undamaged(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: mark an undamaged checkpoint; run the command that `doctor --verify` prints."""
    mark_damaged(LocalStore(steps), 3, "a block")
    status, said, _ = run(capsys, steps)
    assert (status, "a resume takes step 2" in said) == (7, True)
    verify, prune = f"holdfast verify {steps}/step-3 --mark", f"holdfast prune {steps} --damaged"
    assert troubles(capsys, steps)["step-3"]["mend"] == f"{verify}; {prune}"
    found = json.loads(run(capsys, steps, "--verify", "--json")[1])
    (trouble,) = found["troubles"]
    assert trouble["mend"] == verify
    assert "every byte matches its checksum" in trouble["what"]
    assert main(shlex.split(trouble["mend"])[1:]) == 0
    capsys.readouterr()
    assert "a resume takes step 3\n  no problems" in run(capsys, steps)[1]


@pytest.mark.parametrize("with_older", [True, False])
def test_the_command_for_a_marked_checkpoint_ends_the_problem_if_it_is_damaged(
    with_older: bool, steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4, G11. Method: flip a bit and mark the checkpoint, as a resume does. `verify --mark` names
    the next command. The command of `doctor` removes the checkpoint, or leads to the one that
    rescues its model if there is no other."""
    for step in () if with_older else (1, 2):
        shutil.rmtree(steps / f"step-{step}")
    damage_optimizer(steps / "step-3")
    mark_damaged(LocalStore(steps), 3, "a block")
    assert main(["verify", str(steps / "step-3"), "--mark"]) == 7
    assert f"hint: `holdfast prune {steps} --damaged` deletes" in capsys.readouterr().err
    (trouble,) = troubles(capsys, steps).values()
    if with_older:
        mend(trouble)
        assert troubles(capsys, steps) == {}
        return
    assert trouble["mend"].endswith(f"; holdfast doctor {steps} --verify")
    (trouble,) = json.loads(run(capsys, steps, "--verify", "--json")[1])["troubles"]
    assert "--model-only" in trouble["mend"]


def test_a_copy_under_another_step_is_reported(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: a copy beside its original, and a renamed checkpoint, which a command renames
    back."""
    shutil.copytree(steps / "step-3", steps / "step-99")
    (steps / "step-2").rename(steps / "step-50")
    found = troubles(capsys, steps)
    assert found.keys() == {"step-99", "step-50"}
    assert found["step-99"]["concern"] == "unknown"
    assert "it holds step 3: it is a copy of that step" in found["step-99"]["what"]
    assert found["step-99"]["mend"] is None
    subprocess.run(found["step-50"]["mend"], shell=True, check=True)
    assert troubles(capsys, steps).keys() == {"step-99"}
    assert "a resume takes step 3\n  unknown: step-99" in run(capsys, steps, "--verify")[1]


def test_the_command_for_leftovers_of_killed_saves_deletes_them(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: an attempt, and the lock of a run that has ended."""
    (steps / ".attempt-step-4-0123abcd").mkdir()
    (steps / LOCK).write_text(f"host {os.uname().nodename}, pid 1, since then")
    found = troubles(capsys, steps)
    assert found[LOCK]["mend"] is None
    assert "which has ended; the next run takes it over" in found[LOCK]["what"]
    command = shlex.split(found[".attempt-step-4-0123abcd"]["mend"])
    assert main(command[1:]) == 0
    capsys.readouterr()
    assert troubles(capsys, steps) == {}
    (steps / LOCK).write_text("host elsewhere, pid 1, since then")
    assert "another machine" in troubles(capsys, steps)[LOCK]["what"]


def test_a_running_save_is_reported_as_in_use_and_not_disturbed(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: hold the lock as a run does, with an attempt; it is still held afterwards."""
    (steps / ".attempt-step-4-0123abcd").mkdir()
    with LocalStore(steps).lock(LOCK, "host here, pid 7"):
        found = troubles(capsys, steps)
        assert found.keys() == {LOCK}
        assert "by host here, pid 7, 1 folder in progress" in found[LOCK]["what"]
        assert LocalStore(steps).holder(LOCK) == "host here, pid 7"
    assert LocalStore(steps).holder(LOCK) is None


def test_the_command_for_a_checkpoint_under_another_name_renames_it(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a renamed checkpoint, a copy, a folder of notes; run the command."""
    (steps / "notes").mkdir()
    (steps / "step-3").rename(steps / "my best")
    shutil.copytree(steps / "step-2", steps / "step-2.bak")
    found = troubles(capsys, steps)
    assert "leaves it alone" in found["notes/"]["what"]
    assert found["step-2.bak/"]["mend"] is None
    assert run(capsys, steps)[0] == 0
    subprocess.run(found["my best/"]["mend"], shell=True, check=True)
    assert "a resume takes step 3" in run(capsys, steps)[1]


def test_a_full_disk_and_missing_permissions_are_errors(
    steps: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11. Method: a store without free space; a folder of another user, where the test can make
    one."""

    class Full(LocalStore):
        def free_bytes(self) -> int:
            return 1000

    name = steps.name
    folder = doctor.ExaminedFolder(
        Full(steps.parent), name, LocalStore(steps.parent).list(name), _reports(steps), {}
    )
    (found,) = doctor.examine(folder)
    assert (found.concern, "1.0 kB are free" in found.what) == ("space", True)
    assert found.mend == f"holdfast prune --keep-latest-k 2 {steps}"
    steps.chmod(0o500)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda _, right: right != os.W_OK)
    status, said, err = run(capsys, steps)
    steps.chmod(0o700)
    assert (status, "rights" in said, "would fail" in err) == (StorageError.exit_status, True, True)


def _reports(steps: Path) -> list[Any]:
    from holdfast.catalog.verify import VerifyTarget, verify

    store = LocalStore(steps)
    return [verify(VerifyTarget(store, f"step-{step}", quick=True)) for step in (1, 2, 3)]


@pytest.mark.parametrize("path", ["missing", "steps/step-1", "."])
def test_a_folder_without_checkpoints_is_an_error(
    steps: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, steps.parent / path)[0] == 4
