"""The right that a user lacks to a file or folder, and the command that grants it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from holdfast.cli.rights import missing_right
from holdfast.errors import StorageError
from holdfast.storage.local import LocalStore


def refusing(path: Path, refused: int) -> Callable[[str | Path, int], bool]:
    """Return an `os.access` that refuses rights to one path, as it does to a user without root's
    rights."""

    def access(found: str | Path, right: int) -> bool:
        return not (Path(found) == path and right & refused)

    return access


@pytest.mark.parametrize(
    ("mode", "refused", "writes", "command"),
    [(0o500, os.W_OK, True, "u+w"), (0o300, os.R_OK, False, "u+r"), (0o600, os.X_OK, True, "u+x")],
)
def test_a_folder_of_this_user_gets_the_right_that_it_lacks(
    mode: int,
    refused: int,
    writes: bool,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G11. Method: a folder without one bit of its mode; run the command."""
    path = tmp_path / "my run"
    path.mkdir()
    assert missing_right(path, writes=writes) is None
    path.chmod(mode)
    monkeypatch.setattr(os, "access", refusing(path, refused))
    found = missing_right(path, writes=writes)
    assert found is not None
    assert found.mend == f"chmod {command} '{path}'"
    assert f"its mode {mode:03o} lacks the right {command[2:]}" in found.what
    subprocess.run(["bash", "-c", found.mend], check=True)
    assert path.stat().st_mode & 0o700 == 0o700 if writes else path.stat().st_mode & 0o400


def test_a_read_only_mount_another_owner_and_other_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11. Method: writing is refused; the file system is mounted read-only, the owner is another
    user, or neither owner nor mode explains it."""
    monkeypatch.setattr(os, "access", refusing(tmp_path, os.W_OK))
    found = missing_right(tmp_path, writes=True)
    assert (found is not None, found and found.mend) == (True, None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 4321)
        found = missing_right(tmp_path, writes=True)
        assert found is not None
        assert found.mend == f"sudo chown -R 4321 {tmp_path}"
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    found = missing_right(tmp_path, writes=True)
    assert found is not None
    assert (found.mend or "").startswith("sudo mount -o remount,rw /")
    assert "is mounted read-only" in found.what


def test_a_folder_above_that_cannot_be_searched_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11. Method: a file in a folder without the right to search; a missing file."""
    (tmp_path / "step-1").mkdir(mode=0o600)
    (tmp_path / "step-1/manifest.json").touch()
    monkeypatch.setattr(os, "access", refusing(tmp_path / "step-1", os.X_OK))
    found = missing_right(tmp_path / "step-1/manifest.json")
    assert found is not None
    assert found.mend == f"chmod u+x {tmp_path}/step-1"
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 4321)
        found = missing_right(tmp_path / "step-1/manifest.json")
        assert found is not None
        assert (found.mend, "is owned by user" in found.what) == (None, True)
    assert missing_right(tmp_path / "missing") is None


def test_a_checkpoint_that_cannot_be_renamed_cannot_be_removed(tmp_path: Path) -> None:
    """G11. Method: the renames of a deletion and of a save fail: the error says what was to be
    done."""
    store = LocalStore(tmp_path)
    with pytest.raises(StorageError, match=rf"cannot remove `{tmp_path}/step-1`: No such file"):
        store.unpublish("step-1", ".removing-step-1-0123abcd")
    with pytest.raises(StorageError, match=rf"cannot publish `{tmp_path}/step-1`: No such file"):
        store.publish(".attempt-step-1-0123abcd", "step-1")
