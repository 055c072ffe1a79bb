"""Setting up a new machine shows progress, and explains failures."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/usr/bin/env bash
# Stands in for an interpreter whose pip takes a while.
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *find_spec*) echo None ;;
    "-m pip install "*)
        echo "Collecting torch==2.13.0"
        sleep "$PIP_S"
        [ "$PIP_STATUS" = 0 ] || echo "ERROR: No matching distribution found for torch" >&2
        exit "$PIP_STATUS" ;;
esac
"""

SCRIPT = 'source scripts/setup.sh\nsetup ""\necho done\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copy the files that the set-up reads, and make an interpreter."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def set_up(project: Path, *, seconds: str, status: str = "0") -> subprocess.CompletedProcess[str]:
    pip = {"PYTHON": str(project / "python"), "PIP_S": seconds, "PIP_STATUS": status}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", SCRIPT],
        cwd=project,
        env={**os.environ, **pip},
        text=True,
        capture_output=True,
        timeout=60,
    )


def test_the_set_up_shows_progress_of_pip_and_is_silent_the_second_time(
    project: Path,
) -> None:
    """Method: a pip that takes seven seconds, with its output in a log; a line after five."""
    first = set_up(project, seconds="7")
    assert (first.returncode, first.stdout) == (0, "done\n")
    lines = first.stderr.splitlines()
    assert lines[0].startswith(f"setting up {project}/.venv (once; takes minutes")
    assert lines[1] == "5 s: Collecting torch==2.13.0"
    assert lines[2].startswith("set up in ")
    assert len(lines) == 3
    again = set_up(project, seconds="6")
    assert (again.returncode, again.stdout, again.stderr) == (0, "done\n", "")


def test_a_failure_of_pip_is_shown_and_the_next_set_up_tries_again(project: Path) -> None:
    ended = set_up(project, seconds="0", status="1")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "Collecting torch==2.13.0\nERROR: No matching distribution" in ended.stderr
    assert "hint: run the same command again" in ended.stderr
    assert set_up(project, seconds="0").returncode == 0
