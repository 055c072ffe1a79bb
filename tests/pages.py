"""Runs the code blocks of a page from top to bottom, as a reader would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from runs import ROOT
from warm import python

FIRST = ("index", "install", "quickstart")
GUIDE = {
    path.stem: path
    for path in [
        *(ROOT / "docs" / f"{name}.md" for name in FIRST),
        *sorted((ROOT / "docs" / "guide").glob("*.md")),
    ]
}
"""Pages whose blocks a test runs from top to bottom, by name."""

STEPS = 12
"""Steps of a training run whose command on the page has no `--training.steps`."""


INTERPRETER = "HOLDFAST_TESTS_INTERPRETER"
"""Environment variable that sets the interpreter of `./run_train.sh` in a furnished folder."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Return language and text of every code block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)


def interpreter(text: str) -> str:
    """Return the warm interpreter for the programs of a page."""
    frameworks = re.search(r"^(?:from|import) (?:accelerate|peft|pytorch_l|transf|trl)", text, re.M)
    return python(frameworks=frameworks is not None)


def furnish(folder: Path, *, steps: int = STEPS, workers: int = 1, page: str = "") -> None:
    """Make a folder that looks like a clone with its `.venv`, whose training runs are short.

    `page`: text of the page whose programs run there.
    """
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    shutil.copy(ROOT / "LICENSE", folder / "train.txt")
    short = (
        f"--training.steps {steps} --training.seq_len 16 --training.global_batch_size 4 "
        f"--training.local_batch_size 2 --training.dataset_path {folder}/train.txt"
    )
    training = (
        (ROOT / "run_train.sh")
        .read_text()
        .replace('$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)', str(ROOT))
        .replace('"$root/.venv/bin/python"', f'"${{{INTERPRETER}:-{python()}}}"')
        .replace(' "$@"', f' {short} "$@"')
    )
    assert python() in training
    assert short in training
    scripts = {
        folder / "run_train.sh": f"export NGPU=${{NGPU:-{workers}}}\n{training}",
        programs / "holdfast": f'exec {python()} -m holdfast.cli "$@"',
        programs / "torchrun": f'exec {python()} -m torch.distributed.run "$@"',
        programs / "python": f'exec {interpreter(page)} "$@"',
        programs / "pip": "exit 0",
    }
    for path, script in scripts.items():
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    (programs / "activate").touch()
    (folder / "scripts").symlink_to(ROOT / "scripts")


def environment(folder: Path) -> dict[str, str]:
    """Environment variables for the commands of a page."""
    path = f"{folder}/.venv/bin:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(folder), "OMP_NUM_THREADS": "1"}


def on_few_workers(line: str) -> str:
    """Return a command with two workers in place of four, which would share two cores: most of
    their time goes to the first step of tensor parallelism."""
    return line.replace("NGPU=4", "NGPU=2")


def run_line(folder: Path, line: str) -> str:
    """Run a line of shell. Returns its output.

    A comment `# status N` in the line gives the expected exit status; the default is 0.
    """
    ran = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment(folder),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
    )
    expected = re.search(r"# status (\d+)", line)
    assert ran.returncode == (int(expected[1]) if expected else 0), f"{line}\n{ran.stdout}"
    return ran.stdout


def follow(folder: Path, page: str) -> list[tuple[str, str]]:
    """Run every block of a page in order. Returns the lines of shell with their outputs.

    A block whose first line is `# NAME.py` or `# NAME.toml` is written to that file. Other Python
    blocks and each line of shell are run. Runs of four workers have two.
    """
    said = []
    for language, text in blocks(page):
        name = re.match(r"# (\w+\.(?:py|toml))\n", text)
        if name is not None:
            (folder / name[1]).write_text(text)
        elif language == "python":
            command = [interpreter(page), "-c", text]
            subprocess.run(command, cwd=folder, env=environment(folder), check=True, timeout=200)
        elif language == "sh":
            lines = [line for line in text.splitlines() if not line.startswith("./run_tests.sh")]
            said += [(line, run_line(folder, on_few_workers(line))) for line in lines]
    return said
