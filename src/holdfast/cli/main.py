"""Run `holdfast COMMAND ...`: import the module of the command, and print its errors.

Results go to stdout, everything else to stderr. If a command fails, the class of its error in
`holdfast.errors` sets the exit status.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from holdfast.arguments import not_installed
from holdfast.cli.terminal import command_in, prepare_streams, say_error, unwritten
from holdfast.errors import HoldfastError

COMMANDS = {
    "completion": "print the script with which a shell completes commands and options",
    "convert": "convert a checkpoint into another format: dcp, hf, torch",
    "diff": "compare two checkpoints, in any formats",
    "doctor": "find problems in a folder of checkpoints, and the command that fixes each",
    "list": "list the checkpoints in a folder, and the one that a resume takes",
    "prune": "remove checkpoints that no rule keeps, and leftovers of killed saves",
    "report": "write a page of HTML about a run and its checkpoints",
    "serve": "serve live web pages, metrics for Prometheus and a health check",
    "show": "show the tensors and values in a checkpoint, and where each is stored",
    "verify": "check every byte of a checkpoint, or of each one in a folder",
    "skills": "install guides for coding agents, and keep them up to date",
    "train": "run the reference training on workers of this machine",
    "version": "print the installed versions",
}
"""Summary of each command. It is kept here so that `--help` need not import the commands."""

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the one of this process. Return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        prepare_streams()
        if hasattr(signal, "SIGPIPE"):
            # If a reader such as `head` closes the pipe early, exit without a traceback.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        try:
            return _run(given)
        except HoldfastError as error:
            return _failed(given, error)
        except ImportError as error:
            return _failed(given, not_installed(error, f"`holdfast {given[0]}`"))
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            # Flush here, where an error is reported. At its exit, Python would print a traceback.
            sys.stdout.flush()
    except OSError as error:
        return _failed(given, unwritten(error))


def _failed(given: Sequence[str], error: HoldfastError) -> int:
    """Print an error, with its traceback if `given` has `--debug`. Return the exit status."""
    if "--debug" in given:
        import traceback  # Imported here, since only failed commands need it.

        say_error(traceback.format_exc().rstrip())
    say_error(f"error: {error}")
    return error.exit_status


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        arguments = ["version", *arguments[1:]]
    about, example = "Checkpoints of PyTorch training runs.", "holdfast list outputs/checkpoint"
    command = command_in("holdfast", COMMANDS, arguments, about, example)
    if command is None:
        return 0
    # Import only the module of this command, since those of other commands import torch or numpy.
    status: int = import_module(f"holdfast.cli.{command}").run(arguments[1:])
    return status
