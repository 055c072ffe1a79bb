"""`holdfast skills`: output and exit status of its commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from holdfast.cli.main import main
from holdfast.cli.skills import COMMANDS
from holdfast.skills.bundle import shipped
from skills import files_in


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that `--to agents` means."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".agents/skills"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["skills", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_sync_and_update_print_counts_and_the_skipped_skills(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a first sync; another one after one copy was changed and one deleted; as JSON."""
    count = len(shipped())
    assert run(capsys, "sync")[1] == (
        f"{root}: {count} new ({', '.join(sorted(shipped()))}), 0 updated, 0 cleaned, 0 current, "
        "0 skipped\n"
    )
    (root / "holdfast/SKILL.md").write_text("mine")
    shutil.rmtree(root / "torchtitan")
    said = (
        f"{root}: 0 new, 0 updated, 0 cleaned, {count - 2} current, 2 skipped "
        "(holdfast: modified; torchtitan: deleted)\n"
    )
    assert run(capsys, "sync") == (0, said, "")
    assert run(capsys, "update") == (0, said, "")
    (found,) = json.loads(run(capsys, "sync", "--json")[1])
    assert {one["name"]: one["state"] for one in found["skills"]}["holdfast"] == "modified"


def test_a_dry_run_writes_nothing_and_a_check_exits_with_6(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: before the first sync, and after it."""
    status, said, _ = run(capsys, "sync", "--dry-run")
    assert status == 0
    assert " new (" in said
    status, _, err = run(capsys, "sync", "--check")
    assert status == 6
    assert "is not up to date" in err
    assert not root.exists()
    assert run(capsys, "update")[0] == 4
    run(capsys, "sync")
    assert run(capsys, "sync", "--check")[0] == 0


def test_list_and_show_print_the_shipped_skills(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: text and JSON; a reference; unknown names."""
    status, said, _ = run(capsys, "list")
    assert status == 0
    assert all(name in said for name in shipped())
    listed = json.loads(run(capsys, "list", "--json")[1])
    assert listed["folder"] == str(root)
    assert {one["state"] for one in listed["skills"]} == {"new"}
    entry = shipped()["holdfast"].files["SKILL.md"].decode()
    assert run(capsys, "show", "holdfast")[1] == entry
    found = json.loads(run(capsys, "show", "holdfast", "references/repair.md", "--json")[1])
    assert found["text"] == shipped()["holdfast"].files["references/repair.md"].decode()
    status, _, err = run(capsys, "show", "holdfast", "references/repairs.md")
    assert (status, "did you mean `references/repair.md`?" in err) == (4, True)
    assert run(capsys, "show", "holdfats")[0] == 4


def test_diff_shows_a_changed_copy_and_reset_and_remove_archive_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: run all three on a changed copy; then sync, and reset the removed skill."""
    run(capsys, "sync")
    path = root / "holdfast/SKILL.md"
    path.write_text(path.read_text() + "a line of mine\n")
    assert "-a line of mine\n" in run(capsys, "diff", "holdfast")[1]
    assert list(json.loads(run(capsys, "diff", "holdfast", "--json")[1])["files"]) == ["SKILL.md"]
    said = run(capsys, "reset", "holdfast")[1]
    assert "is as shipped; yours: " in said
    assert Path(said.split("yours: ")[1].strip()).exists()
    assert run(capsys, "diff", "holdfast") == (0, "", "")
    assert "gone for good" in run(capsys, "remove", "holdfast")[1]
    assert "holdfast: deleted" in run(capsys, "sync")[1]
    assert run(capsys, "diff", "holdfast")[0] == 4
    run(capsys, "reset", "holdfast")
    assert files_in(root / "holdfast") == shipped()["holdfast"].files


def test_sync_takes_a_path_and_a_project_as_targets(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a path; a project outside of a repository, then in one."""
    assert run(capsys, "sync", "--to", "some/where")[0] == 0
    assert (root.parents[1] / "some/where/holdfast/SKILL.md").exists()
    assert run(capsys, "sync", "--project")[0] == 4
    (root.parents[1] / ".git").mkdir()
    assert run(capsys, "sync", "--project", "--to", "claude")[0] == 0
    assert (root.parents[1] / ".claude/skills/holdfast/SKILL.md").exists()
    assert not root.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["skills", command, "--help"])
    assert ended.value.code == 0
    assert f"Example: holdfast skills {command}" in capsys.readouterr().out


def test_help_lists_the_commands_and_a_misspelled_one_gets_a_hint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, said, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"  {command}" in said for command in COMMANDS)
    status, _, err = run(capsys, "snyc")
    assert (status, "did you mean `holdfast skills sync`?" in err) == (2, True)
    assert run(capsys)[0] == 2
