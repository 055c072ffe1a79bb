"""The sync of skills, with a kill or a power cut before each of its operations on the disk."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from extent import every
from holdfast.skills.copies import STATE, Copies
from holdfast.skills.disk import Disk
from holdfast.skills.sync import remove, reset, sync
from skills import V1, V2, CutDisk, CutError, ForgetfulDisk, bundle, files_in, skill

OLD, NEW = bundle(alpha="old", beta="old"), bundle(alpha="new", beta="new", gamma="new")
MINE = "own/mine.md"
SURVIVORS = 3
"""States of the disk that are tried for each power cut."""


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the waits for the real disk: files outlive a killed process without them, and
    `ForgetfulDisk` records itself what a power cut spares."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def install(root: Path, disk: Disk) -> None:
    sync(OLD, Copies(root, disk=disk), V1)


def update(root: Path, disk: Disk) -> None:
    sync(NEW, Copies(root, disk=disk), V2)


def put_back(root: Path, disk: Disk) -> None:
    reset(NEW["alpha"], Copies(root, disk=disk), V2)


def take_away(root: Path, disk: Disk) -> None:
    remove(OLD["alpha"], Copies(root, disk=disk), V1)


Work = Callable[[Path, Disk], None]
WORKS = (install, update, put_back, take_away)


def prepared(root: Path, work: Work) -> None:
    """Make a folder with the user's own files, and an older install with changes."""
    root.mkdir(parents=True)
    (root / "other").mkdir()
    (root / "other/SKILL.md").write_text("the user's own")
    if work is install:
        return
    install(root, Disk())
    (root / "alpha/own").mkdir()
    (root / "alpha" / MINE).write_text("the user's own")
    if work is put_back:
        (root / "alpha/SKILL.md").write_text("changed")


def num_operations(folder: Path, work: Work, *, exchanges: bool) -> int:
    prepared(folder / "skills", work)
    disk = CutDisk(0, lambda: None, exchanges=exchanges)
    work(folder / "skills", disk)
    return disk.operations


def check(root: Path, work: Work) -> None:
    """Assert that copies are old or new, the user's files are there, and another sync completes."""
    name, mine = "alpha", {MINE: b"the user's own"}
    if work is take_away:
        assert not (root / name).exists() or files_in(root / name) == {**OLD[name].files, **mine}
        assert not (root / name).exists() or remove(OLD[name], Copies(root), V1)
        assert _archived(root, b"the user's own")
    elif work is put_back:
        reset(NEW[name], Copies(root), V2)
        assert files_in(root / name) == {**NEW[name].files, **mine}
        assert _archived(root, b"changed")
    shipped = OLD if work in (install, take_away) else NEW
    done = sync(shipped, Copies(root), V1 if shipped is OLD else V2)
    assert not done.problems
    assert done.names("deleted") == ([name] if work is take_away else [])
    for one in shipped.values():
        if work is take_away and one.name == name:
            assert not (root / name).exists()
            continue
        own = mine if one.name == name and work is not install else {}
        assert files_in(root / one.name) == {**one.files, **own}
    assert (root / "other/SKILL.md").read_text() == "the user's own"
    assert not list((root / STATE).glob("stage-*")) + list((root / STATE).glob("write-*"))
    again = sync(shipped, Copies(root), V1 if shipped is OLD else V2)
    assert not again.changes


def _archived(root: Path, data: bytes) -> bool:
    import tarfile

    for kept in (root / STATE).glob("kept-*"):
        with tarfile.open(kept) as archive:
            members = [archive.extractfile(member) for member in archive if member.isfile()]
            if any(member and data in member.read() for member in members):
                return True
    return False


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("work", WORKS)
def test_a_sync_killed_before_any_operation_leaves_whole_copies(
    tmp_path: Path, work: Work, exchanges: bool
) -> None:
    """G14. Method: a process kills itself before its n-th operation on the disk, also on file
    systems that cannot exchange two names; by default for every sixth n. Where they can, every copy
    is the old or the new one even before the next sync."""
    count = num_operations(tmp_path / "counted", work, exchanges=exchanges)
    assert count > 5
    for cut in every(6, range(1, count + 1), start=exchanges):
        root = tmp_path / str(cut) / "skills"
        prepared(root, work)
        pid = os.fork()
        if pid == 0:
            disk = CutDisk(cut, lambda: os.kill(os.getpid(), signal.SIGKILL), exchanges=exchanges)
            work(root, disk)
            os._exit(0)
        _, ended = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(ended), f"operation {cut} of {count} was not reached"
        if exchanges and work is update:
            mine = {MINE: b"the user's own"}
            either = [{**of["alpha"].files, **mine} for of in (OLD, NEW)]
            assert files_in(root / "alpha") in either
        check(root, work)


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("work", WORKS)
def test_a_power_cut_before_any_operation_loses_no_copy(
    tmp_path: Path, work: Work, exchanges: bool
) -> None:
    """G14. Method: before the n-th operation, the disk loses some of the names that are not durable
    yet, chosen in several ways; by default for every sixth n."""
    count = num_operations(tmp_path / "counted", work, exchanges=exchanges)
    for cut in every(6, range(1, count + 1), start=exchanges):
        for chosen in range(SURVIVORS):
            root = tmp_path / "cut" / "skills"
            prepared(root, work)
            disk = ForgetfulDisk(cut, root, exchanges=exchanges)
            with pytest.raises(CutError):
                work(root, disk)
            disk.survivor(Random(f"{cut} {chosen}"))
            check(root, work)
            shutil.rmtree(tmp_path / "cut")


def test_a_copy_that_a_killed_sync_left_behind_is_archived(
    tmp_path: Path,
) -> None:
    """G14. Method: an old copy in the stage of an update, which its user has changed at the last
    moment."""
    root = tmp_path / "skills"
    sync({"alpha": skill("alpha", "1")}, Copies(root), V1)
    left = root / STATE / "stage-alpha-00000000"
    left.mkdir()
    shutil.copytree(root / "alpha", left / "old")
    (left / "old/SKILL.md").write_text("mine")
    sync({"alpha": skill("alpha", "1")}, Copies(root), V1)
    assert _archived(root, b"mine")
    assert not left.exists()
