"""A checkpoint that cannot be read now is not damaged: no command marks or deletes it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import save_step
from holdfast.catalog import seal
from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.marks import damaged_steps, mark_damaged
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.cli.main import main
from holdfast.errors import NotFoundError, StorageError
from holdfast.format import manifest as manifests
from holdfast.format.region import Region
from holdfast.manager.complete import CompleteCheckpoints
from holdfast.planning import index
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore
from holdfast.testing.failing import FailingStore
from manifest_bytes import sealed
from plans import save_regions

FILES = ["manifest.json", ".metadata", "index.bin", "__0_0.distcp", ""]
"""Files of a checkpoint; empty for its folder."""

OF_INDEX = FILES[:3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good checkpoints with an `index.bin`."""
    home = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "LISTED_CHUNKS_MAX", 0)
        for step in (1, 2, 3):
            save_step(home / "steps", step)
    return home / "steps"


@contextmanager
def unreadable(path: Path, number: int) -> Iterator[None]:
    """Let system calls that read a file, or list a folder, fail with an error number."""

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(found: Any, *more: Any, **named: Any) -> Any:
            if isinstance(found, str) and Path(found) == path:
                raise OSError(number, os.strerror(number), found)
            return real(found, *more, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "scandir"):
            patch.setattr(os, name, failing(getattr(os, name)))
        yield


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([*map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("file", FILES)
def test_no_command_marks_or_deletes_a_checkpoint_that_cannot_be_read(
    file: str, number: int, steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4, G16. Method: one file of the newest checkpoint cannot be read. `verify --mark` names it
    and its error, and leaves no mark; `doctor` offers no deletion; `prune --damaged` keeps the
    checkpoint. Afterwards it is good again."""
    path = steps / "step-3" / file
    with unreadable(path, number):
        status, said, err = run(capsys, "verify", steps, "--mark")
        assert status == StorageError.exit_status
        assert f"`{file or 'step-3'}` cannot be read: cannot" in said
        assert os.strerror(number) in said
        assert "a resume takes step 2" in said
        assert "damaged in" not in said
        assert f"`{steps}/step-3` may be undamaged" in err
        assert "hint: " in err

        status, said, _ = run(capsys, "doctor", steps, "--verify", "--json")
        assert status == StorageError.exit_status
        (trouble,) = json.loads(said)["troubles"]
        assert (trouble["concern"], trouble["where"]) == ("unreadable", "step-3")
        assert trouble["mend"] is None

        assert run(capsys, "prune", steps, "--damaged")[0] == 0
        listed = json.loads(run(capsys, "list", steps, "--json")[1])["checkpoints"]
        assert listed[-1]["state"] == ("good" if file.endswith("distcp") else "unreadable")
    assert there(steps) == {"step-1", "step-2", "step-3"}
    assert run(capsys, "verify", steps)[0] == 0


@pytest.mark.parametrize("file", OF_INDEX)
def test_verify_of_one_checkpoint_reports_the_file_that_cannot_be_read(
    file: str, steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: the status, and the hint of the store."""
    with unreadable(steps / "step-3" / file, errno.EACCES):
        status, _, err = run(capsys, "verify", steps / "step-3", "--mark")
    assert (status, file in err, "check the owner" in err) == (9, True, True)
    assert damaged_steps(LocalStore(steps)) == {}


def test_a_mark_stays_while_its_checkpoint_cannot_be_read(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4, G16. Method: a marked checkpoint; then one with a missing file, which is marked, beside a
    file that cannot be read. `prune --damaged` deletes both only once all can be read."""
    mark_damaged(LocalStore(steps), 3, "a block")
    (steps / "step-2/__1_0.distcp").unlink()
    for step in (2, 3):
        with unreadable(steps / f"step-{step}" / ".metadata", errno.EIO):
            assert run(capsys, "verify", steps / f"step-{step}", "--mark")[0] in (7, 9)
            assert run(capsys, "prune", steps, "--damaged", "--dry-run")[0] == 0
            said = json.loads(run(capsys, "prune", steps, "--damaged", "--dry-run", "--json")[1])
            stays = {one["name"]: one["stays"] for one in said["decisions"]}
            assert stays[f"step-{step}"]
            concerns = json.loads(run(capsys, "doctor", steps, "--json")[1])["troubles"]
            assert ("unreadable", f"step-{step}") in [(t["concern"], t["where"]) for t in concerns]
    assert damaged_steps(LocalStore(steps)).keys() == {2, 3}
    assert "`__1_0.distcp` is missing" in damaged_steps(LocalStore(steps))[2]
    assert run(capsys, "prune", steps, "--damaged")[0] == 0
    assert there(steps) == {"step-1"}


def test_a_checkpoint_of_a_newer_version_is_neither_marked_nor_deleted(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4, G16. Method: a manifest with a higher version, under a valid checksum."""
    file = steps / "step-3/manifest.json"
    body = json.loads(file.read_bytes())
    body.pop("checksum")
    file.write_bytes(sealed({**body, "holdfast": 99}, (",", ":")))
    with pytest.raises(manifests.NewerVersionError, match="format version 99"):
        open_manifest(LocalStore(steps), "step-3")
    assert run(capsys, "verify", steps / "step-3")[0] == 8
    status, said, err = run(capsys, "verify", steps, "--mark")
    assert (status, "damaged" in said, "pip install --upgrade holdfast" in err) == (9, False, True)
    assert "format version 99" in run(capsys, "prune", steps, "--damaged")[1]
    assert there(steps) == {"step-1", "step-2", "step-3"}


def test_a_sealed_folder_that_cannot_be_read_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4, G16. Method: a file of a sealed folder, then its seal, cannot be read."""
    for number in (1, 2, 3):
        with seal.sealed(tmp_path / f"checkpoint-{number}") as folder:
            (folder / "weights").write_bytes(bytes(9))
    for file in ("weights", "holdfast.seal"):
        with unreadable(tmp_path / "checkpoint-3" / file, errno.EIO):
            assert run(capsys, "verify", tmp_path)[0] == StorageError.exit_status
            assert run(capsys, "prune", tmp_path, "--damaged", "--keep-latest-k", "1")[0] == 0
            said = json.loads(run(capsys, "doctor", tmp_path, "--verify", "--json")[1])
            assert [trouble["concern"] for trouble in said["troubles"]] == ["unreadable"]
        assert "checkpoint-3" in there(tmp_path)


@pytest.mark.parametrize("file", ["index.bin", "manifest.json", ".metadata", "__0_0.distcp"])
def test_a_pipe_in_place_of_a_file_is_a_finding(
    file: str, steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G8. Method: `verify` of the checkpoint, and of the folder with `--mark`."""
    (steps / "step-3" / file).unlink()
    os.mkfifo(steps / "step-3" / file)
    status, said, _ = run(capsys, "verify", steps / "step-3")
    assert (status, "is a named pipe, not a plain file" in said) == (7, True)
    (finding,) = verify(VerifyTarget(LocalStore(steps), "step-3", quick=True)).findings
    assert (finding.file, finding.unreadable) == (file, False)
    assert run(capsys, "verify", steps, "--mark")[0] == 7
    assert damaged_steps(LocalStore(steps)).keys() == {3}


def test_retention_ignores_files_of_the_user_that_cannot_be_read() -> None:
    """G5. Method: a store that cannot read a file of the user, then `.metadata`: the checkpoint is
    good, then unknown, and good again."""
    beneath, failing = MemoryStore(), {"notes"}

    def fail(verb: str, key: str) -> None:
        if verb in ("read", "size") and key.rpartition("/")[2] in failing:
            raise StorageError(f"cannot {verb} `{key}`: Input/output error")

    save_regions(beneath, "step-1", {"w": (torch.arange(4.0), [[Region((0,), (4,))]])}, 1)
    with beneath.create("step-1/notes", 1) as writer:
        writer.write(0, [b"x"])
    store = FailingStore(beneath, fail)
    complete = CompleteCheckpoints(store)
    assert complete.manifest("step-1").step == 1
    failing.add(".metadata")
    complete = CompleteCheckpoints(store)
    with pytest.raises(StorageError, match=r"step-1/\.metadata"):
        complete.manifest("step-1")
    assert isinstance(complete.errors["step-1"], StorageError)
    failing.clear()
    assert complete.manifest("step-1").step == 1
    assert complete.errors == {}
    with pytest.raises(NotFoundError):
        complete.manifest("step-2")
    complete.look_again({"step-1"})
    assert complete.errors == {}
