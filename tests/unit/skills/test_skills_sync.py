"""The sync of skills: every state, and that the user's own files stay."""

from __future__ import annotations

import fcntl
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from holdfast.errors import ExistsError, FormatError, StorageError
from holdfast.skills.bundle import Skill
from holdfast.skills.copies import STATE, Copies
from holdfast.skills.disk import Disk
from holdfast.skills.records import (
    RECEIPT,
    Ledger,
    SyncRecord,
    decode_ledger,
    decode_receipt,
    digest,
    digests_in,
)
from holdfast.skills.sync import remove, reset, survey, sync
from skills import V1, V2, bundle, files_in, skill


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "skills"


def states(
    root: Path, skills: Mapping[str, Skill], version: str = V1, disk: Disk | None = None
) -> dict[str, str]:
    """Sync; returns the state of each skill before it."""
    done = sync(skills, Copies(root, disk=disk), version)
    assert not done.problems
    return {one.name: one.state for one in done.skills}


def everything(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Returns every file with its time, inode and content."""
    found = (path for path in root.rglob("*") if path.is_file() and path.name != "lock")
    return {
        path.relative_to(root).as_posix(): (
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            path.read_bytes(),
        )
        for path in found
    }


# ------------------------------------------------------------------------------ records, digests


def test_a_receipt_decodes_to_what_was_encoded_and_anything_else_to_none() -> None:
    """Method: encode and decode; then text, other JSON, other types."""
    receipt = SyncRecord(V1, {"SKILL.md": digest(b"text")})
    assert decode_receipt(receipt.encode()) == receipt
    for other in (b"{", b"[]", b'{"holdfast": 1, "files": {}}', b'{"holdfast": "1", "files": [1]}'):
        assert decode_receipt(other) is None


def test_a_ledger_reads_as_it_was_written_and_anything_else_is_an_error() -> None:
    """Method: encode and decode; then nothing, text, other JSON, other types."""
    ledger = Ledger(frozenset({"a", "b"}), frozenset({"c"}))
    assert decode_ledger(ledger.encode(), where="here") == ledger
    for other in (b"", b"{", b"[]", b'{"offered": []}', b'{"offered": [1], "removed": []}'):
        with pytest.raises(FormatError, match="is no record of skills"):
            decode_ledger(other, where="here")


def test_a_digest_tells_files_apart_by_path_content_and_link(tmp_path: Path) -> None:
    """Method: two folders whose paths and contents are the same text when joined; a link in place
    of a file with the same text."""
    for folder, file, text in (("a", "x", "yz"), ("b", "xy", "z"), ("c", "x", "yz")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    assert digests_in(tmp_path / "a") != digests_in(tmp_path / "b")
    assert digests_in(tmp_path / "a") == digests_in(tmp_path / "c")
    (tmp_path / "c" / "x").unlink()
    (tmp_path / "c" / "x").symlink_to("yz")
    assert digests_in(tmp_path / "c") == {"x": "link to yz"}


def test_ends_of_lines_count_in_binary_files_alone() -> None:
    assert digest(b"a\r\nb\r\n") == digest(b"a\nb\n")
    assert digest(b"\0a\r\n") != digest(b"\0a\n")


# ------------------------------------------------------------------------------------------ states


def test_a_fresh_install_copies_everything_with_a_receipt(root: Path) -> None:
    """Method: sync two skills into a folder that does not exist."""
    shipped = bundle(alpha="a", beta="b")
    assert states(root, shipped) == {"alpha": "new", "beta": "new"}
    for name, one in shipped.items():
        assert files_in(root / name) == one.files
        assert decode_receipt((root / name / RECEIPT).read_bytes()) == SyncRecord(V1, one.digests)
    assert not list((root / STATE).rglob("SKILL.md")), "an agent would read it"


def test_a_second_sync_writes_nothing(root: Path) -> None:
    """Method: compare contents, times and inodes of all files."""
    states(root, bundle(alpha="a"))
    before = everything(root)
    assert states(root, bundle(alpha="a")) == {"alpha": "current"}
    assert everything(root) == before


def test_a_copy_as_it_was_installed_is_updated(root: Path) -> None:
    """Method: a version with another text and one file less."""
    states(root, {"alpha": skill("alpha", "old", **{"gone.md": "x"})})
    assert states(root, bundle(alpha="new"), V2) == {"alpha": "outdated"}
    assert files_in(root / "alpha") == skill("alpha", "new").files


def test_a_copy_that_the_user_changed_is_left_alone(root: Path) -> None:
    """Method: change a shipped file, delete another; then sync a newer version."""
    states(root, bundle(alpha="a", beta="b"))
    (root / "alpha/SKILL.md").write_text("mine")
    (root / "beta/references/a.md").unlink()
    assert states(root, bundle(alpha="2", beta="2"), V2) == {
        "alpha": "modified",
        "beta": "modified",
    }
    assert (root / "alpha/SKILL.md").read_text() == "mine"
    assert not (root / "beta/references/a.md").exists()


def test_a_deleted_copy_never_comes_back(root: Path) -> None:
    """Method: delete a copy; sync a newer version, one without the skill, one with it again."""
    states(root, bundle(alpha="a"))
    shutil.rmtree(root / "alpha")
    assert states(root, bundle(alpha="2"), V2) == {"alpha": "deleted"}
    assert sync({}, Copies(root), V2).cleaned == ("alpha",)
    assert sync({}, Copies(root), V2).cleaned == ()
    assert states(root, bundle(alpha="3"), V2) == {"alpha": "deleted"}
    assert not (root / "alpha").exists()


def test_a_foreign_folder_is_never_touched(root: Path) -> None:
    """Method: a folder, a file and two links of the same names, before the first sync and after."""
    (root / "alpha").mkdir(parents=True)
    (root / "alpha/SKILL.md").write_text("mine")
    (root / "beta").write_text("a file")
    (root / "gamma").symlink_to(root / "alpha")
    (root / "delta").symlink_to("nowhere")
    (root / "other").mkdir()
    before = everything(root)
    for text in ("1", "2"):
        shipped = bundle(alpha=text, beta=text, gamma=text, delta=text)
        assert set(states(root, shipped).values()) == {"foreign"}
    assert {path: what for path, what in everything(root).items() if STATE not in path} == before
    assert (root / "gamma").is_symlink()
    assert Copies(root).ledger() == Ledger()


def test_a_link_to_a_copy_is_foreign(root: Path) -> None:
    """Method: move the copy away, and put a link to it in its place."""
    states(root, bundle(alpha="a"))
    (root / "alpha").rename(root / "elsewhere")
    (root / "alpha").symlink_to(root / "elsewhere")
    assert states(root, bundle(alpha="2"), V2) == {"alpha": "foreign"}
    assert files_in(root / "elsewhere") == skill("alpha", "a").files


def test_a_skill_that_is_no_longer_shipped_leaves_the_ledger_and_stays_on_disk(root: Path) -> None:
    """Method: ship two skills, then one, then both with another text."""
    states(root, bundle(alpha="a", gone="g"))
    done = sync(bundle(alpha="a"), Copies(root), V1)
    assert done.cleaned == ("gone",)
    assert files_in(root / "gone") == skill("gone", "g").files
    assert Copies(root).ledger() == Ledger(frozenset({"alpha"}), frozenset({"gone"}))
    assert states(root, bundle(alpha="a", gone="2"), V2)["gone"] == "outdated"
    assert Copies(root).ledger() == Ledger(frozenset({"alpha", "gone"}))


def test_an_older_set_forgets_no_skill_of_a_newer_one(root: Path) -> None:
    """Method: two environments with different sets take turns. The second turn of each changes
    nothing, and what the newer one installed is never cleaned; once the newer one stops shipping a
    skill, it cleans it."""
    older, newer = bundle(alpha="a", old="o"), bundle(alpha="2", fresh="f")
    assert states(root, older) == {"alpha": "new", "old": "new"}
    done = sync(newer, Copies(root), V2)
    assert (done.cleaned, done.names("new"), done.names("outdated")) == (
        ("old",),
        ["fresh"],
        ["alpha"],
    )
    assert str(done) == ("1 new (fresh), 1 updated (alpha), 1 cleaned (old), 0 current, 0 skipped")
    before = {path: at for path, at in everything(root).items() if STATE not in path}
    for _ in range(2):
        done = sync(older, Copies(root), V1)
        assert done.cleaned == ()
        assert "fresh" in Copies(root).ledger().offered
        done = sync(newer, Copies(root), V2)
        assert (done.cleaned, done.names("new", "outdated")) == (("old",), [])
    assert {path: at for path, at in everything(root).items() if STATE not in path} == before
    assert sync(bundle(alpha="2"), Copies(root), V2).cleaned == ("fresh",)


def test_a_copy_deleted_while_it_was_not_shipped_stays_away(root: Path) -> None:
    """Method: stop shipping a skill, delete its copy, ship it again; then reset it."""
    states(root, bundle(alpha="a"))
    sync({}, Copies(root), V1)
    shutil.rmtree(root / "alpha")
    assert states(root, bundle(alpha="2"), V2) == {"alpha": "deleted"}
    reset(skill("alpha", "2"), Copies(root), V2)
    assert states(root, bundle(alpha="2"), V2) == {"alpha": "current"}


def test_an_older_version_changes_nothing_that_a_newer_one_installed(root: Path) -> None:
    """Method: sync by a newer version, an older one, and the newer one again."""
    states(root, bundle(alpha="new"), "0.10.0")
    assert states(root, bundle(alpha="old"), "0.9.1") == {"alpha": "newer"}
    assert Copies(root).synced() == "0.10.0"
    assert states(root, bundle(alpha="new"), "0.10.0") == {"alpha": "current"}


def test_a_copy_restored_by_hand_gets_its_record_back(root: Path) -> None:
    """Method: overwrite an older copy with the newer files; the same without a receipt. The next
    version updates both."""
    states(root, bundle(alpha="1", beta="1"))
    newer = bundle(alpha="2", beta="2")
    for name, one in newer.items():
        for file, data in one.files.items():
            (root / name / file).write_bytes(data)
    (root / "beta" / RECEIPT).unlink()
    assert set(states(root, newer, V2).values()) == {"current"}
    assert set(states(root, bundle(alpha="3", beta="3"), "3.0").values()) == {"outdated"}


# ------------------------------------------------------------------------- files of the user's own


def test_the_users_own_files_neither_block_an_update_nor_are_lost(root: Path) -> None:
    """Method: a file, a file in a new folder, an executable and a link."""
    states(root, bundle(alpha="1"))
    mine = {"mine.md": b"1", "own/deep/mine.md": b"2", "references/mine.sh": b"3"}
    for file, data in mine.items():
        (root / "alpha" / file).parent.mkdir(parents=True, exist_ok=True)
        (root / "alpha" / file).write_bytes(data)
    (root / "alpha/references/mine.sh").chmod(0o755)
    (root / "alpha/link").symlink_to("nowhere")
    assert states(root, bundle(alpha="2"), V2) == {"alpha": "outdated"}
    assert files_in(root / "alpha") == {**skill("alpha", "2").files, **mine}
    assert (root / "alpha/references/mine.sh").stat().st_mode & 0o100
    assert (root / "alpha/link").readlink() == Path("nowhere")


@pytest.mark.parametrize(("mine", "new"), [("a.md", "a.md"), ("a", "a/b.md"), ("a/b/c", "a/b")])
def test_a_file_in_the_way_of_a_new_one_stays(root: Path, mine: str, new: str) -> None:
    """Method: the same path; a file where a folder is needed; a folder where a file is needed."""
    states(root, bundle(alpha="1"))
    (root / "alpha" / mine).parent.mkdir(parents=True, exist_ok=True)
    (root / "alpha" / mine).write_text("mine")
    newer = {"alpha": skill("alpha", "2", **{new: "theirs"})}
    assert states(root, newer, V2) == {"alpha": "modified"}
    assert (root / "alpha" / mine).read_text() == "mine"


def test_files_that_programs_create_are_no_change(root: Path) -> None:
    """Method: files of Python and of file browsers; a checkout with CRLF."""
    states(root, bundle(alpha="1"))
    (root / "alpha/__pycache__").mkdir()
    (root / "alpha/__pycache__/x.pyc").write_bytes(b"1")
    (root / "alpha/.DS_Store").write_bytes(b"1")
    entry = root / "alpha/SKILL.md"
    entry.write_bytes(entry.read_bytes().replace(b"\n", b"\r\n"))
    assert states(root, bundle(alpha="2"), V2) == {"alpha": "outdated"}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_change_by_the_user_during_an_update_is_kept(root: Path, exchanges: bool) -> None:
    """Method: the user saves a file right before the new copy is renamed; also on a file system
    that cannot exchange two names."""

    class Meddling(Disk):
        def exchange(self, a: Path, b: Path) -> bool:
            if a.name == "new":
                (root / "alpha/SKILL.md").write_text("mine")
            return exchanges and super().exchange(a, b)

    states(root, bundle(alpha="1"))
    done = sync(bundle(alpha="2"), Copies(root, disk=Meddling()), V2)
    assert "was changed during the sync" in done.problems[0]
    assert (root / "alpha/SKILL.md").read_text() == "mine"
    assert not list((root / STATE).glob("stage-*"))


# ---------------------------------------------------------------------------- errors and contention


def test_a_failing_disk_leaves_no_half_copy_and_the_next_sync_continues(root: Path) -> None:
    """Method: a disk that is full for one of two skills, and one that writes less than it was
    given; a first sync and an update."""

    class Full(Disk):
        def write(self, path: Path, data: bytes) -> None:
            if b"reference" in data and "alpha" in str(path):
                raise OSError(28, "No space left on device")
            super().write(path, data)

    class Short(Disk):
        def write(self, path: Path, data: bytes) -> None:
            super().write(path, data[:-1] if "alpha" in str(path) else data)

    for disk, problem in ((Full(), "No space left"), (Short(), "does not hold what was written")):
        done = sync(bundle(alpha="1", beta="1"), Copies(root, disk=disk), V1)
        assert problem in done.problems[0]
        assert (root / "beta").exists()
        assert not (root / "alpha").exists()
        assert not Copies(root).synced()
        assert not list((root / STATE).glob("stage-*"))
    assert states(root, bundle(alpha="1", beta="1")) == {"alpha": "new", "beta": "current"}
    assert sync(bundle(alpha="2", beta="1"), Copies(root, disk=Full()), V2).problems
    assert files_in(root / "alpha") == skill("alpha", "1").files


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_an_unreadable_ledger_is_an_error_and_never_empty(
    root: Path, content: bytes | None
) -> None:
    """Method: an empty file, text, a folder in its place. The deleted skill is not installed."""
    states(root, bundle(alpha="1"))
    shutil.rmtree(root / "alpha")
    ledger = root / STATE / "ledger.json"
    ledger.unlink()
    ledger.mkdir() if content is None else ledger.write_bytes(content)
    with pytest.raises(StorageError if content is None else FormatError):
        sync(bundle(alpha="1"), Copies(root), V1)
    assert not (root / "alpha").exists()


def test_a_copy_with_a_damaged_receipt_is_foreign(root: Path) -> None:
    """Method: truncate a receipt. A reset is refused until the folder is moved away."""
    states(root, bundle(alpha="1"))
    (root / "alpha" / RECEIPT).write_text("{")
    assert states(root, bundle(alpha="2"), V2) == {"alpha": "foreign"}
    with pytest.raises(ExistsError, match="was not made by holdfast"):
        reset(skill("alpha", "2"), Copies(root), V2)
    (root / "alpha").rename(root / "mine")
    reset(skill("alpha", "2"), Copies(root), V2)
    assert files_in(root / "alpha") == skill("alpha", "2").files


def test_a_file_that_cannot_be_read_stops_only_its_skill(root: Path) -> None:
    """Method: a named pipe, which a reader would wait for."""
    import os

    states(root, bundle(alpha="1", beta="1"))
    os.mkfifo(root / "alpha/pipe")
    done = sync(bundle(alpha="2", beta="2"), Copies(root), V2)
    assert [one.problem is None for one in done.skills] == [False, True]
    assert files_in(root / "beta") == skill("beta", "2").files


def test_a_sync_does_nothing_while_another_holds_the_lock(root: Path) -> None:
    """Method: lock the file by another descriptor."""
    states(root, bundle(alpha="1"))
    with (root / STATE / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sync(bundle(alpha="2"), Copies(root), V2).busy
        with pytest.raises(ExistsError, match="another sync is at work"):
            reset(skill("alpha", "2"), Copies(root), V2)
    assert files_in(root / "alpha") == skill("alpha", "1").files


def test_a_survey_writes_nothing(root: Path) -> None:
    """Method: a folder that does not exist, and one that is out of date."""
    assert survey(bundle(alpha="1"), Copies(root), V1).changes
    assert not root.exists()
    states(root, bundle(alpha="1"))
    before = everything(root)
    assert survey(bundle(alpha="2"), Copies(root), V2).names("outdated") == ["alpha"]
    assert everything(root) == before


def test_deleting_the_whole_folder_is_a_fresh_start(root: Path) -> None:
    states(root, bundle(alpha="1"))
    shutil.rmtree(root)
    assert states(root, bundle(alpha="1")) == {"alpha": "new"}


# --------------------------------------------------------------------------------- reset and remove


def test_a_reset_installs_the_shipped_skill_and_archives_a_changed_copy(root: Path) -> None:
    """Method: reset a changed copy, an unchanged one, a deleted one; all by an older version."""
    states(root, bundle(alpha="1"), V2)
    (root / "alpha/SKILL.md").write_text("mine")
    (root / "alpha/own.md").write_text("my own")
    kept = reset(skill("alpha", "1"), Copies(root), V1)
    assert kept is not None
    with tarfile.open(kept) as archive:
        changed = archive.extractfile("alpha/SKILL.md")
        assert changed is not None
        assert changed.read() == b"mine"
    assert files_in(root / "alpha") == {**skill("alpha", "1").files, "own.md": b"my own"}
    (root / "alpha/own.md").unlink()
    assert reset(skill("alpha", "1"), Copies(root), V1) is None
    shutil.rmtree(root / "alpha")
    assert reset(skill("alpha", "1"), Copies(root), V1) is None
    assert states(root, bundle(alpha="2"), V2) == {"alpha": "outdated"}


def test_a_removed_skill_never_comes_back(root: Path) -> None:
    """Method: remove; sync a version without the skill, a newer one with it; then reset it."""
    states(root, bundle(alpha="1", beta="1"))
    (root / "beta/SKILL.md").write_text("mine")
    assert remove(skill("alpha", "1"), Copies(root), V1) is None
    kept = remove(skill("beta", "1"), Copies(root), V1)
    assert kept is not None
    assert Path(kept).exists()
    sync({}, Copies(root), V2)
    assert set(states(root, bundle(alpha="2", beta="2"), V2).values()) == {"deleted"}
    reset(skill("alpha", "2"), Copies(root), V2)
    assert states(root, bundle(alpha="2", beta="2"), V2)["alpha"] == "current"


def test_a_skill_moved_into_a_category_is_kept_up_to_date_there(root: Path) -> None:
    """Method: move the copy one folder deeper where that is allowed, and sync."""
    shipped = Copies(root, categories=True)
    sync(bundle(alpha="1"), shipped, V1)
    (root / "training").mkdir()
    (root / "alpha").rename(root / "training/alpha")
    assert sync(bundle(alpha="2"), shipped, V2).names("outdated") == ["alpha"]
    assert files_in(root / "training/alpha") == skill("alpha", "2").files
    assert not (root / "alpha").exists()
