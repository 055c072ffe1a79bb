"""`holdfast doctor`: each thing that can be wrong with a folder, and the command that mends it."""

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


@pytest.fixture
def steps(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "steps"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main(["doctor", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def troubles(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, dict[str, Any]]:
    """By what they are about."""
    found = json.loads(run(capsys, folder, "--json")[1])
    return {trouble["where"]: trouble for trouble in found["troubles"]}


def test_nothing_is_wrong_with_a_folder_that_a_run_has_left(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, err = run(capsys, steps, "--verify")
    assert (status, err) == (0, "")
    assert said == f"{steps}: 3 steps, a resume takes step 3\n  nothing is wrong\n"


def test_damaged_steps_are_named_with_what_a_resume_does(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: a file missing; then one bit in another step, which only `--verify` sees, and the
    first look says that it has read no data. The command that is offered mends it."""
    (steps / "step-3/__1_0.distcp").unlink()
    status, said, _ = run(capsys, steps)
    assert status == 7
    assert "a resume passes it over, and takes step 2" in said
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
    assert run(capsys, steps, "--verify")[1].endswith("takes step 1\n  nothing is wrong\n")


def mend(trouble: dict[str, Any]) -> None:
    """Run the command of a trouble as a shell does."""
    script = f'holdfast() {{ {sys.executable} -m holdfast.cli "$@"; }}\n{trouble["mend"]}'
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)


def test_where_no_step_is_left_what_is_whole_can_be_taken_out(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: the optimizer of every step damaged: its model becomes a seed elsewhere; then an
    index that is gone, which nothing mends."""
    for step in (1, 2):
        shutil.rmtree(steps / f"step-{step}")
    entry = holdfast.open(steps / "step-3").manifest.tensors["optimizer.moment"]
    file = steps / "step-3" / entry.chunks[0].file
    data = bytearray(file.read_bytes())
    data[(entry.chunks[0].data_offset or 0) + 5] ^= 1
    file.write_bytes(data)
    assert run(capsys, steps, "--verify")[0] == 7
    found = json.loads(run(capsys, steps, "--verify", "--json")[1])
    assert found["resume"] is None
    mend(found["troubles"][0])
    seed = holdfast.open(f"{steps}-rescued/step-0")
    assert all(name.startswith("model.") for name in seed.names())
    (steps / "step-3/manifest.json").unlink()
    status, said, _ = run(capsys, steps)
    assert (status, "no command mends it: put a copy in its place" in said) == (7, True)
    assert troubles(capsys, steps)["step-3"]["mend"] is None


def test_a_step_that_a_run_has_marked_is_read_again_and_its_mark_taken_away(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: a mark at a step that is whole; the command of the second look is run."""
    mark_damaged(LocalStore(steps), 3, "a block")
    status, said, _ = run(capsys, steps)
    assert (status, "a resume takes step 2" in said) == (7, True)
    assert troubles(capsys, steps)["step-3"]["mend"] == f"holdfast verify {steps}/step-3 --mark"
    found = json.loads(run(capsys, steps, "--verify", "--json")[1])
    (trouble,) = found["troubles"]
    assert "every byte of it is as it was written" in trouble["what"]
    assert main(shlex.split(trouble["mend"])[1:]) == 0
    capsys.readouterr()
    assert "a resume takes step 3\n  nothing is wrong" in run(capsys, steps)[1]


def test_what_killed_saves_left_goes_by_the_command_that_is_offered(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: an attempt, and the note of a run that has died."""
    (steps / ".attempt-step-4-0123abcd").mkdir()
    (steps / LOCK).write_text(f"host {os.uname().nodename}, pid 1, since then")
    found = troubles(capsys, steps)
    assert found[LOCK]["mend"] is None
    assert "which has died; the next run takes it over" in found[LOCK]["what"]
    command = shlex.split(found[".attempt-step-4-0123abcd"]["mend"])
    assert main(command[1:]) == 0
    capsys.readouterr()
    assert troubles(capsys, steps) == {}
    (steps / LOCK).write_text("host elsewhere, pid 1, since then")
    assert "another machine" in troubles(capsys, steps)[LOCK]["what"]


def test_a_run_at_work_is_no_trouble_and_is_not_disturbed(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: the lock held as by a run, with an attempt on the way; it is still held after."""
    (steps / ".attempt-step-4-0123abcd").mkdir()
    with LocalStore(steps).lock(LOCK, "host here, pid 7"):
        found = troubles(capsys, steps)
        assert found.keys() == {LOCK}
        assert "by host here, pid 7, 1 folder on the way" in found[LOCK]["what"]
        assert LocalStore(steps).holder(LOCK) == "host here, pid 7"
    assert LocalStore(steps).holder(LOCK) is None


def test_checkpoints_under_other_names_are_named_and_given_the_name_of_their_step(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a copy, a step renamed, a folder that is none; the command is run."""
    (steps / "notes").mkdir()
    (steps / "step-3").rename(steps / "my best")
    shutil.copytree(steps / "step-2", steps / "step-2.bak")
    found = troubles(capsys, steps)
    assert "leaves it alone" in found["notes/"]["what"]
    assert found["step-2.bak/"]["mend"] is None
    assert run(capsys, steps)[0] == 0
    subprocess.run(found["my best/"]["mend"], shell=True, check=True)
    assert "a resume takes step 3" in run(capsys, steps)[1]


def test_a_save_that_would_fail_is_an_error(
    steps: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11. Method: a store that says it is full; a folder of somebody else's, where the test can
    make one."""

    class Full(LocalStore):
        def free_bytes(self) -> int:
            return 1000

    name = steps.name
    folder = doctor.Folder(
        Full(steps.parent), name, LocalStore(steps.parent).list(name), _reports(steps), {}
    )
    (found,) = doctor.examine(folder)
    assert (found.concern, "1.0 kB are free" in found.what) == ("space", True)
    assert found.mend == f"holdfast prune --keep-latest-k 2 {steps}"
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        steps.chmod(0o500)
    status, said, err = run(capsys, steps)
    steps.chmod(0o700)
    assert (status, "rights" in said, "would fail" in err) == (StorageError.exit_status, True, True)


def _reports(steps: Path) -> list[Any]:
    from holdfast.catalog.verify import VerifyTarget, verify

    store = LocalStore(steps)
    return [verify(VerifyTarget(store, f"step-{step}", quick=True)) for step in (1, 2, 3)]


@pytest.mark.parametrize("path", ["missing", "steps/step-1", "."])
def test_what_is_no_folder_of_steps_is_not_found(
    steps: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, steps.parent / path)[0] == 4
