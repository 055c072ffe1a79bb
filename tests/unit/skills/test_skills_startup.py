"""Folders for skills, and the quiet sync at the start of a command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.errors import NotFoundError, UsageError
from holdfast.release import installed_version
from holdfast.skills.bundle import Skill, shipped
from holdfast.skills.copies import STATE, Copies
from holdfast.skills.startup import refresh
from holdfast.skills.sync import sync
from holdfast.skills.targets import HOMES, all_targets, target_of
from skills import files_in

OLDER = "0.0.1"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a repository, in which the test runs."""
    (tmp_path / "repository/.git").mkdir(parents=True)
    (tmp_path / "repository/deep").mkdir()
    monkeypatch.chdir(tmp_path / "repository/deep")
    return tmp_path


def outdated(root: Path) -> None:
    """Sync as an older version, with one skill missing and one with another text."""
    _, *rest = shipped().values()
    rest[0] = Skill(rest[0].name, {**rest[0].files, "SKILL.md": b"older"})
    sync({one.name: one for one in rest}, Copies(root), OLDER)


def test_targets_are_the_folders_of_the_agents(home: Path) -> None:
    """Method: each name, with its variable set, in a project, and a path."""
    here = Path.cwd()

    def root(to: str, *, project: bool = False, **environment: str) -> Path:
        given = {"HOME": str(home), **environment}
        return target_of(to, project=project, environment=given, here=here).root

    assert root("agents") == home / ".agents/skills"
    assert root("claude") == home / ".claude/skills"
    assert root("claude", CLAUDE_CONFIG_DIR="/etc/claude") == Path("/etc/claude/skills")
    assert root("codex") == home / ".codex/skills"
    assert root("hermes") == home / ".hermes/skills"
    assert root("claude", project=True) == home / "repository/.claude/skills"
    assert root("some/where") == here / "some/where"
    named = [target.root for target in all_targets({"HOME": str(home)}, here)]
    assert len(named) == len(set(named)) == 7
    hermes = target_of("hermes", project=False, environment={"HOME": str(home)}, here=here)
    (home / ".hermes/skills/training/alpha").mkdir(parents=True)
    (home / ".hermes/skills/training/alpha/SKILL.md").write_text("moved")
    assert hermes.folder("alpha") == home / ".hermes/skills/training/alpha"
    for to in ("hermes", "some/where"):
        with pytest.raises(UsageError, match="--project"):
            root(to, project=True)
    with pytest.raises(NotFoundError, match="in no repository"):
        target_of("agents", project=True, environment={}, here=home)


def test_a_start_does_nothing_before_the_first_sync_by_hand(home: Path) -> None:
    """Method: homes of every agent, with the user's own skills."""
    for folder, _ in HOMES.values():
        (home / folder / "skills/mine").mkdir(parents=True)
    before = sorted(home.rglob("*"))
    assert refresh({"HOME": str(home)}) == []
    assert sorted(home.rglob("*")) == before


def test_a_start_updates_every_folder_that_was_synced_before(home: Path) -> None:
    """Method: a home and a project that an older version has synced; a second start changes
    nothing."""
    roots = (home / ".claude/skills", home / "repository/.agents/skills")
    for root in roots:
        outdated(root)
    said = refresh({"HOME": str(home)})
    assert len(said) == 2
    assert all("1 new (" in line and "1 updated (" in line for line in said)
    for root in roots:
        for name, one in shipped().items():
            assert files_in(root / name) == one.files
        assert Copies(root).synced() == installed_version()
    assert refresh({"HOME": str(home)}) == []


@pytest.mark.parametrize(
    "environment", [{"CI": "1"}, {"RANK": "3"}, {"LOCAL_RANK": "1"}, {"SLURM_PROCID": "2"}]
)
def test_a_start_does_nothing_in_ci_and_on_other_ranks(
    home: Path, environment: dict[str, str]
) -> None:
    root = home / ".agents/skills"
    outdated(root)
    assert refresh({"HOME": str(home), **environment}) == []
    assert Copies(root).synced() == OLDER
    assert refresh({"HOME": str(home), **dict.fromkeys(environment, "0"), "CI": ""})


def test_a_failing_sync_is_reported_as_a_line_and_never_raises(home: Path) -> None:
    """Method: a damaged ledger in one folder; the other folder is synced."""
    broken, whole = home / ".agents/skills", home / ".claude/skills"
    for root in (broken, whole):
        outdated(root)
    (broken / STATE / "ledger.json").write_text("{")
    said = refresh({"HOME": str(home)})
    assert "were not brought up to date" in said[0]
    assert all(words in said[1] for words in ("1 new (", "1 updated ("))
    shutil.rmtree(broken)
    broken.mkdir()
    (broken / STATE).write_text("a file")
    assert refresh({"HOME": str(home)}) == []


def test_a_start_with_nothing_to_do_reads_one_file_per_folder(home: Path) -> None:
    """Method: record the files that a start opens by Python's audit events."""
    sync(shipped(), Copies(home / ".agents/skills"), installed_version())
    script = (
        "import sys\n"
        "from holdfast.skills.startup import refresh\n"
        f"home = {str(home)!r}\nopened = []\n"
        "def hook(event, arguments):\n"
        "    if event == 'open': opened.append(str(arguments[0]))\n"
        "sys.addaudithook(hook)\n"
        "assert refresh({'HOME': home}) == []\n"
        f"found = [one for one in opened if one.startswith(home)]\n"
        f"assert home + '/.agents/skills/{STATE}/synced' in found\n"
        "assert len(found) == len(set(found)) == 7, found\n"
        "assert all(one.endswith('/synced') for one in found), found\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_training_starts_with_a_sync(home: Path) -> None:
    """Method: a run of one step on one worker."""
    from runs import train

    root = home / ".agents/skills"
    outdated(root)
    import os

    before = dict(os.environ)
    os.environ |= {"HOME": str(home), "CI": ""}
    try:
        ran = train("--training.steps", "1", ranks=1, cwd=home)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert ran.returncode == 0, ran.stdout
    assert all(words in ran.stdout for words in ("1 new (", "1 updated ("))
    assert Copies(root).synced() == installed_version()
