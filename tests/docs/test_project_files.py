"""Files about the project agree with each other: versions, issue forms, hooks, the release."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def matrix() -> dict[str, list[str]]:
    """Return the versions that CI tests, by package."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    found: dict[str, list[str]] = workflow["jobs"]["test"]["strategy"]["matrix"]
    return found


def test_versions_that_are_claimed_are_those_that_ci_runs() -> None:
    """Method: compare the matrix of the CI workflow with the README, the compatibility page and the
    package's metadata."""
    torch, python = matrix()["torch"], matrix()["python"]
    assert torch[-1] == "newest"
    classifiers = [text.rpartition(" ")[2] for text in PROJECT["classifiers"]]
    assert [version for version in classifiers if version.startswith("3.")] == python
    assert PROJECT["requires-python"] == f">={python[0]}"
    assert f"torch>={torch[0]}" in PROJECT["dependencies"]
    for page in ("README.md", "docs/compatibility.md"):
        text = (ROOT / page).read_text()
        assert f"{torch[0]} to {torch[-2]}" in text
        assert re.search(rf"{python[0]}\s+to\s+{python[-1]}", text)


def test_forms_and_hooks_are_well_formed() -> None:
    """Method: parse each file as YAML. Every script that a hook names exists."""
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys() or "contact_links" in form
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        for script in re.findall(r"scripts/\w+\.py", hook["entry"]):
            assert (ROOT / script).exists()


def test_the_links_of_the_project_are_of_one_repository() -> None:
    """Method: compare the repository in the package's metadata with every link to a repository in
    the documents."""
    home = PROJECT["urls"]["Homepage"]
    assert all(url.startswith(home) for url in PROJECT["urls"].values())
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.yml")]
    for path in texts:
        for url in re.findall(r"https://github\.com/[\w-]+/holdfast\b", path.read_text()):
            assert url == home, path


def test_the_changelog_keeps_its_form() -> None:
    """Method: check the rules of Keep a Changelog: headings of versions, newest first, with known
    kinds of change."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.M)
    assert versions[0] == ("Unreleased", "")
    dates = [date for _, date in versions[1:]]
    assert all(dates)
    assert dates == sorted(dates, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (\w+)$", text, re.M)) <= kinds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no version given"),
        (["--publish"], "unknown option"),
        (["1.2"], "is not a version"),
        (["0.1.0"], "tag `v0.1.0` exists"),
        (["0.2.0"], "the working tree has changes"),
        (["0.2.0", "--dry-run"], "CHANGELOG.md has no entry"),
    ],
)
def test_a_release_is_refused_with_the_reason(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    """Method: run the release script in a small repository whose changelog has no entries."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/release.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "pyproject.toml"], ["commit", "-qm", "first"]):
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    subprocess.run(["git", "tag", "v0.1.0"], cwd=tmp_path, check=True)
    script = ["bash", "scripts/release.sh", *arguments]
    ran = subprocess.run(script, cwd=tmp_path, text=True, capture_output=True)
    assert ran.returncode == 2
    assert message in ran.stderr


def test_the_matrix_of_versions_ends_with_a_table_and_1_if_one_fails(tmp_path: Path) -> None:
    """G6. Method: an interpreter that cannot make an environment."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/matrix.sh", tmp_path / "scripts")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no venv here\nexit 1\n")
    broken.chmod(0o755)
    ran = subprocess.run(
        [tmp_path / "scripts/matrix.sh", "2.11", "2.14.1"],
        env={**os.environ, "PYTHON": str(broken)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert ran.stderr.count("no venv here") == 2
    rows = ran.stdout.splitlines()[2:]
    # The last column is the time, in seconds.
    assert [row.rsplit("|", 2)[0] for row in rows] == [
        "| 2.11 | | installation failed ",
        "| 2.14.1 | | installation failed ",
    ]
