"""Output that cannot be written, or that the encoding of the stream lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import holdfast
from checkpoints import save_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("saved") / "outputs/checkpoint"
    save_step(folder, 1)
    return folder


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which `holdfast` is the command."""
    line = line.replace("holdfast ", f"{sys.executable} -m holdfast.cli ")
    return subprocess.run(["bash", "-c", line], text=True, capture_output=True)


def test_a_reader_that_closes_the_pipe_early_causes_no_error(folder: Path) -> None:
    """Method: pipe stdout to a program that ends at once."""
    assert shell(f"holdfast list {folder} --json | true").stderr == ""


@pytest.mark.parametrize("command", ["list", "list --json", "verify", "list --help", "--help"])
def test_output_that_cannot_be_written_is_one_error(command: str, folder: Path) -> None:
    """G8. Method: stdout on a full disk. stderr gets an error and a hint, and no traceback; the
    exit status is 9.
    """
    argument = "" if "--help" in command else folder
    ran = shell(f"holdfast {command} {argument} > /dev/full")
    assert ran.stderr.startswith("error: cannot write the output: No space left on device\nhint: ")
    assert len(ran.stderr.splitlines()) == 2
    assert ran.returncode == 9


def test_a_closed_stream_is_no_error(folder: Path) -> None:
    """G8. Method: the shell closes stdout, for a command that succeeds and for one that fails; then
    stderr is closed, or on a full disk. The exit status is the usual one.
    """
    ran = shell(f"holdfast list {folder} >&-")
    assert (ran.stderr, ran.returncode) == ("", 0)
    ran = shell(f"holdfast list {folder}/nothing >&-")
    assert ran.stderr.startswith("error: nothing at")
    assert ran.returncode == 4
    for closed in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        assert shell(f"holdfast list {folder}/nothing {closed}").returncode == 4


def test_a_character_that_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    """G8. Method: a name that ASCII lacks, of a tensor on stdout, and of a folder in an error."""
    holdfast.save(tmp_path / "step-1", {"gr\u00f6\u00dfe": torch.ones(2)})
    ran = shell(f"PYTHONUTF8=0 PYTHONIOENCODING=ascii holdfast show {tmp_path}/step-1")
    assert (ran.stderr, ran.returncode) == ("", 0)
    assert "gr\\xf6\\xdfe" in ran.stdout
    ran = shell(f"PYTHONUTF8=0 PYTHONIOENCODING=ascii holdfast show {tmp_path}/gr\u00f6\u00dfe")
    assert (ran.stdout, ran.returncode) == ("", 4)
    assert "gr\\xf6\\xdfe" in ran.stderr
