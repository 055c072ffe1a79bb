"""`holdfast train`: run the reference training on this machine, as `./run_train.sh` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from holdfast.cli.terminal import say
from holdfast.errors import UsageError

CONFIG_FILE = "train_configs/debug_model.toml"

HELP = """\
usage: holdfast train [--section.key value ...]

Train a model on workers of this machine and save checkpoints. Run again, training resumes from the
newest checkpoint. Environment: NGPU is the number of workers (default: one per GPU; 2 on the CPU
without GPUs), CONFIG_FILE a TOML file (default: train_configs/debug_model.toml), LOG_RANK the ranks
that log (default: 0).

Example: holdfast train --training.steps 200
"""


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast train`: replace this process by one that starts the workers, and whose exit
    status is then that of the command.
    """
    if {"-h", "--help"} & {*arguments}:
        say(HELP)
    elif not any(argument.startswith("--job.config") for argument in arguments):
        arguments = ["--job.config_file", _config_file(os.environ), *arguments]
    sys.stdout.flush()
    # The launcher forks its workers, so run it in a new interpreter, which has no threads yet.
    launcher = [sys.executable, "-m", "holdfast.trainer.launch", *arguments]
    os.execv(sys.executable, launcher)


def _config_file(environment: os._Environ[str]) -> str:
    """Return the path of the settings file: `CONFIG_FILE` in the environment, or the default.

    Search for it in the current folder, then in the root of Holdfast's repository.
    """
    file = environment.get("CONFIG_FILE", CONFIG_FILE)
    for path in (Path(file), Path(__file__).parents[3] / file):
        if path.exists():
            return str(path)
    if "CONFIG_FILE" in environment:
        # The launcher reports that the file is missing, and lists the files beside it.
        return file
    raise UsageError(
        f"there is no file `{CONFIG_FILE}`",
        hint="name the file of settings: CONFIG_FILE=settings.toml holdfast train",
    )
