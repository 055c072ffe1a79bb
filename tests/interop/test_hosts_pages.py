"""The programs on the pages of DeepSpeed, Composer and Ray Train, if these are installed: killed,
damaged and resumed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import holdfast
from host_runs import damage
from pages import GUIDE, blocks
from runs import ROOT

KILLED = ROOT / "tests/killed_program.py"

DIES = f"""
        import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
        from host_runs import kill_at
        if rank == 1 and start == 0:
            kill_at("__1_0.distcp", times=3)
"""
"""Lines before the loop of a worker of Ray, with which it dies in its third save."""


def program_of(page: str, folder: Path) -> Path:
    """Write the program of a page into a folder."""
    texts = [text for language, text in blocks(GUIDE[page].read_text()) if language == "python"]
    (text,) = (text for text in texts if text.startswith("# train_"))
    folder.mkdir()
    program = folder / text.splitlines()[0].removeprefix("# ")
    program.write_text(text)
    return program


def run(folder: Path, *command: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a program with this interpreter, without the warnings of the packages under test."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    interpreter = [sys.executable, *launch] if ranks > 1 else [sys.executable]
    return subprocess.run(
        [*interpreter, *command],
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "RAY_TRAIN_V2_ENABLED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=400,
    )


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("package", "name", "file", "ranks"),
    [("deepspeed", "global_step", "*_optim_states.pt", 2), ("composer", "ba", "state.pt", 1)],
    ids=["deepspeed", "composer"],
)
def test_a_sealed_run_is_killed_damaged_and_resumed(
    package: str, name: str, file: str, ranks: int, tmp_path: Path
) -> None:
    """Method: SIGKILL in the third of four saves, when the seal is written. Then a bit of the
    second checkpoint is flipped: the run resumes from the first, and ends with the tensors of a run
    without a kill."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = run(whole, program_of(package, whole), ranks=ranks)
    assert said.returncode == 0, said.stdout
    program = program_of(package, killed)
    said = run(killed, KILLED, "holdfast.seal", "3", "0", program, ranks=ranks)
    assert said.returncode != 0
    root = killed / "outputs" / package
    saved = folders(root)
    assert [entry.partition("6-")[0] for entry in saved] == [
        f".attempt-{name}",
        f"{name}2",
        f"{name}4",
    ]
    damage(str(next((root / f"{name}4").glob(file))), "flipped")
    said = run(killed, program, ranks=ranks)
    assert said.returncode == 0, said.stdout
    assert re.search(rf"passed over `\S+/{name}4`", said.stdout)
    assert "start at step 2" in said.stdout
    assert folders(root) == [f"{name}{step}" for step in (2, 4, 6, 8)]
    assert holdfast.check(root / f"{name}8") == []
    last = f"outputs/{package}/{name}8" + ("" if package == "deepspeed" else f"/{file}")
    assert run(tmp_path, "-m", "holdfast.cli", "diff", whole / last, killed / last).returncode == 0


@pytest.mark.timeout(1200)
def test_ray_restarts_killed_workers_and_they_resume(tmp_path: Path) -> None:
    """Method: SIGKILL of one worker in the third of four saves, when its data file is opened. Ray
    restarts the workers, which resume from the second. Then a bit of the last checkpoint is
    flipped, and a new program saves it again, with the weights of a run without a kill."""
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = run(whole, program_of("ray-train", whole))
    assert said.returncode == 0, said.stdout
    program = program_of("ray-train", killed)
    text = program.read_text()
    loop = "        for step in range"
    assert text.count(loop) == 1
    program.write_text(text.replace(loop, f"{DIES}{loop}"))
    said = run(killed, program)
    assert said.returncode == 0, said.stdout
    assert "start at step 4" in said.stdout
    last = "outputs/ray/checkpoint/step-8"
    # Random numbers of numpy and Python differ: the program seeds only those of torch.
    diff = ("-m", "holdfast.cli", "diff", "--model-only", whole / last, killed / last)
    assert run(tmp_path, *diff).returncode == 0
    damage(str(killed / last / "__0_0.distcp"), "flipped")
    program.write_text(text)
    said = run(killed, program)
    assert said.returncode == 0, said.stdout
    assert "start at step 6" in said.stdout
    assert run(tmp_path, *diff).returncode == 0
