"""`holdfast train`: the reference training run on workers of this machine, as `./run_train.sh`."""

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

Train a model, save checkpoints, resume from them, on workers of this machine: run again, it goes
on from the newest checkpoint. NGPU in the environment is the number of workers (default: as many as
GPUs; 2 on the CPU where there is none), CONFIG_FILE a TOML file (default:
train_configs/debug_model.toml), LOG_RANK the ranks that log (default: 0).

Example: holdfast train --training.steps 200
"""


def run(arguments: Sequence[str]) -> int:
    """Become the launcher of the run, whose exit status it is."""
    if {"-h", "--help"} & {*arguments}:
        say(HELP)
    elif not any(argument.startswith("--job.config") for argument in arguments):
        arguments = ["--job.config_file", _config_file(os.environ), *arguments]
    sys.stdout.flush()
    # Not imported: the workers are forked from a process that holds nothing else.
    launcher = [sys.executable, "-m", "holdfast.trainer.launch", *arguments]
    os.execv(sys.executable, launcher)


def _config_file(environment: os._Environ[str]) -> str:
    """The file of settings: relative to where the user stands, else to the project."""
    file = environment.get("CONFIG_FILE", CONFIG_FILE)
    for path in (Path(file), Path(__file__).parents[3] / file):
        if path.exists():
            return str(path)
    if "CONFIG_FILE" in environment:
        return file  # The launcher says that it is not there, and what is.
    raise UsageError(
        f"no file of settings: `{CONFIG_FILE}` is not there",
        hint="CONFIG_FILE=settings.toml holdfast train",
    )
