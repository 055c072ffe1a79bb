"""Sealed folders: published complete, checked byte by byte, known to every command."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.catalog.seal import sync_files
from holdfast.cli.main import main
from holdfast.errors import FormatError
from holdfast.format.seal import SEAL, Seal, SealedFile, decode, encode


def seal(path: Path, content: bytes = b"x" * 100, *, overwrite: bool = False) -> Path:
    with holdfast.sealed(path, overwrite=overwrite) as folder:
        (folder / "inner").mkdir()
        (folder / "inner/large.bin").write_bytes(bytes(9_000_000))
        (folder / "small.txt").write_bytes(content)
        (folder / "empty").touch()
    return path


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_files_appear_together(tmp_path: Path) -> None:
    with holdfast.sealed(tmp_path / "a") as folder:
        (folder / "one").write_text("1")
        assert names(tmp_path) == [folder.name]
        assert folder.name.startswith(".attempt-a-")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == [SEAL, "one"]
    assert holdfast.check(tmp_path / "a") == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    """An error of the block, an empty block, or a link to a folder: the old folder stays."""
    seal(tmp_path / "a")
    with pytest.raises(KeyError), holdfast.sealed(tmp_path / "a", overwrite=True):
        raise KeyError
    with (
        pytest.raises(holdfast.UsageError, match="nothing was written"),
        holdfast.sealed(tmp_path / "a", overwrite=True),
    ):
        pass
    with (
        pytest.raises(holdfast.UsageError, match="`link` is neither a file nor a folder"),
        holdfast.sealed(tmp_path / "a", overwrite=True) as folder,
    ):
        (folder / "link").symlink_to(tmp_path)
    assert names(tmp_path) == ["a"]
    assert holdfast.check(tmp_path / "a") == []


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside", "missing"])
def test_a_link_to_anything_else_than_a_file_of_the_folder_is_refused(
    tmp_path: Path, target: str
) -> None:
    (tmp_path / "outside").write_text("x")
    with (
        pytest.raises(holdfast.UsageError, match="`link` is neither a file nor a folder"),
        holdfast.sealed(tmp_path / "a") as folder,
    ):
        (folder / "one").write_text("1")
        (folder / "link").symlink_to(target)
    assert names(tmp_path) == ["outside"]


def test_a_link_to_a_file_of_the_folder_is_sealed_and_a_later_one_out_of_it_is_damage(
    tmp_path: Path,
) -> None:
    with holdfast.sealed(tmp_path / "a") as folder:
        (folder / "one").write_text("1")
        (folder / "latest").symlink_to("one")
    assert holdfast.check(tmp_path / "a") == []
    (tmp_path / "b").write_text("1")
    (tmp_path / "a/one").unlink()
    (tmp_path / "a/one").symlink_to(tmp_path / "b")
    found = [finding.file for finding in holdfast.check(tmp_path / "a")]
    assert found == ["latest", "one"]


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files could be neither hashed nor synced."""
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("/inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with (
        pytest.raises(holdfast.StorageError, match=r"cannot seal .*Permission denied.*inner"),
        holdfast.sealed(tmp_path / "a") as folder,
    ):
        (folder / "inner").mkdir()
        (folder / "inner/file").write_text("x")
        (folder / "one").write_text("1")
        monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()
    seal(tmp_path / "b")
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(holdfast.StorageError, match="Permission denied"):
        sync_files(tmp_path / "b")


def test_what_may_be_replaced(tmp_path: Path) -> None:
    seal(tmp_path / "a")
    with pytest.raises(holdfast.ExistsError, match="exists already"):
        seal(tmp_path / "a")
    seal(tmp_path / "a", b"new", overwrite=True)
    assert (tmp_path / "a/small.txt").read_bytes() == b"new"
    (tmp_path / "a/inner/notes").write_text("mine")
    with pytest.raises(holdfast.ExistsError, match="inner/notes"):
        seal(tmp_path / "a", overwrite=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/notes").write_text("mine")
    with pytest.raises(holdfast.ExistsError, match="notes"):
        seal(tmp_path / "b", overwrite=True)
    assert names(tmp_path) == ["a", "b"]


def test_damage_is_found(tmp_path: Path) -> None:
    """G3. Method: a flipped bit, a file of another size, a missing one, a damaged seal."""
    path = seal(tmp_path / "a")
    flip(path / "inner/large.bin", 5_000_000)
    (path / "small.txt").write_bytes(b"short")
    (path / "empty").unlink()
    found = {finding.file: finding.what for finding in holdfast.check(path)}
    assert found["inner/large.bin"].startswith("block 1 has checksum")
    assert found["small.txt"] == "has 5 bytes, 100 were written"
    assert found["empty"] == "is missing"
    assert {finding.file for finding in holdfast.check(path, quick=True)} == {"small.txt", "empty"}
    flip(path / SEAL, 10)
    assert [finding.file for finding in holdfast.check(path)] == [SEAL]


def test_the_newest_good_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """G4. Method: by number, not by text; damaged and unsealed ones are passed over, and named."""
    assert holdfast.newest_good(tmp_path) is None
    for number in (5, 10, 100):
        seal(tmp_path / f"checkpoint-{number}")
    assert holdfast.newest_good(tmp_path) == tmp_path / "checkpoint-100"
    flip(tmp_path / "checkpoint-100/inner/large.bin", 0)
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-200/model.bin").write_bytes(b"torn")
    assert holdfast.newest_good(tmp_path) == tmp_path / "checkpoint-10"
    assert "checkpoint-100`: `inner/large.bin` block 0" in caplog.text
    assert "checkpoint-200`: it has no seal" in caplog.text
    assert holdfast.newest_good(tmp_path, "checkpoint-?") == tmp_path / "checkpoint-5"
    with pytest.raises(holdfast.NotFoundError):
        holdfast.newest_good(tmp_path / "none")
    assert "pass another `pattern`" not in caplog.text


@pytest.mark.parametrize("function", [holdfast.newest_good, holdfast.hosts.newest_good])
def test_checkpoints_under_names_that_the_pattern_lacks_are_named_in_a_warning(
    function: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G11. Method: the folder of a manager, and the default pattern; then the right one."""
    assert function(tmp_path) is None
    (tmp_path / "notes").mkdir()
    assert function(tmp_path) is None
    assert not caplog.text
    holdfast.save(tmp_path / "step-20", {"a": 1})
    assert function(tmp_path) is None
    assert "no folder named `checkpoint-*`, but a checkpoint `step-20`" in caplog.text
    assert function(tmp_path, "step-*") == tmp_path / "step-20"


def test_files_are_synced_where_no_thread_can_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G2. Method: a process at a limit of its threads; count the syncs."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    synced: list[int] = []
    seal(tmp_path / "a")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    sync_files(tmp_path / "a")
    assert len(synced) == len(["inner", "inner/large.bin", "small.txt", "empty", SEAL, "."])


def test_a_folder_that_a_killed_save_has_set_aside_is_found(tmp_path: Path) -> None:
    seal(tmp_path / "checkpoint-5").rename(tmp_path / ".replaced-checkpoint-5-0123abcd")
    newest = holdfast.newest_good(tmp_path)
    assert newest == tmp_path / ".replaced-checkpoint-5-0123abcd"
    seal(tmp_path / "checkpoint-9")
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-9"]


def test_the_commands_know_sealed_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`list`, `verify`, `doctor` and `prune`, with one damaged and one unsealed folder."""
    root = tmp_path / "out"
    for number in (5, 10, 100):
        seal(root / f"checkpoint-{number}")
    flip(root / "checkpoint-100/inner/large.bin", 0)
    (root / "checkpoint-200").mkdir()

    def said(*arguments: str, status: int = 0) -> str:
        assert main([*arguments]) == status
        return capsys.readouterr().out

    listed = said("list", str(root)).splitlines()
    assert [line.split()[0] for line in listed[1:-1]] == [
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-100",
    ]
    found = json.loads(said("list", str(root), "--verify", "--json", status=7))
    assert found["resume"] == 10
    assert "3 files, 9.0 MB" in said("verify", str(root / "checkpoint-10"))
    assert "`inner/large.bin`" in said("verify", str(root / "checkpoint-100"), status=7)
    assert "a resume takes step 10" in said("verify", str(root), status=7)
    examined = said("doctor", str(root), "--verify", status=7)
    assert f"rm -r {root}/checkpoint-100" in examined
    assert "checkpoint-200/: has no seal" in examined
    assert "checkpoint-5 " in said("prune", str(root), "--keep-latest-k", "2")
    assert names(root) == [".lock", "checkpoint-10", "checkpoint-100", "checkpoint-200"]


def test_a_seal_reads_back_and_others_are_refused() -> None:
    written = Seal({"a/b": SealedFile(5, (7,)), "e": SealedFile(0, ())}, "now", {"holdfast": "1"})
    data = encode(written)
    assert decode(data, where="s") == written
    for name in ("../a", "/a", "a//b", "a/./b", ""):
        with pytest.raises(FormatError, match="is not a seal"):
            decode(encode(Seal({name: SealedFile(0, ())})), where="s")
    with pytest.raises(FormatError, match="2 checksums"):
        decode(encode(Seal({"a": SealedFile(5, (1, 2))})), where="s")
    with pytest.raises(holdfast.DamagedError, match="own checksum"):
        decode(data[:-5], where="s")
