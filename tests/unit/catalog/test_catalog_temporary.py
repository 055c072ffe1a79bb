"""Folders of this machine for the files of checkpoints in object stores."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.catalog.temporary import TemporaryFolder


def test_a_folder_of_a_killed_process_is_deleted(tmp_path: Path) -> None:
    """A folder that a process has locked stays, and so do files of other programs."""
    (tmp_path / "other").mkdir()
    child = os.fork()
    if not child:
        made = TemporaryFolder.make(tmp_path)
        (made.path / "weights").write_bytes(b"1")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    first, second = TemporaryFolder.make(tmp_path), TemporaryFolder.make(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "other",
        first.path.name,
        second.path.name,
    }
    first.delete()
    second.delete()
    second.delete()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_file_system_without_locks_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: `flock` fails as on such a file system. No folder can be known to be left over."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    first, second = TemporaryFolder.make(tmp_path), TemporaryFolder.make(tmp_path)
    assert first.path.is_dir()
    first.delete()
    second.delete()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(holdfast.StorageError, match="TMPDIR"):
        TemporaryFolder.make(tmp_path / "file")
