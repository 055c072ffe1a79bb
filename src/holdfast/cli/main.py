"""`holdfast VERB ...`: finds the verb, and says what went wrong.

stdout holds what was asked for, stderr all else; the exit status is that of the error
(holdfast.errors).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from holdfast.arguments import not_installed
from holdfast.cli.terminal import prepare_streams, say_error, unwritten, verb_in
from holdfast.errors import HoldfastError

VERBS = {
    "completion": "what a shell needs to complete verbs and options",
    "convert": "a checkpoint into another format: dcp, hf, torch",
    "diff": "what differs between two checkpoints, whatever formats they are in",
    "doctor": "what is wrong with a checkpoint folder, and the command that mends it",
    "list": "the steps in a checkpoint folder, and which one a resume takes",
    "prune": "remove steps that no rule keeps, and what killed saves left",
    "report": "a run and its checkpoints on one page of HTML",
    "serve": "runs as live web pages, metrics for Prometheus, a health check",
    "show": "what a checkpoint holds, and where each tensor lies",
    "verify": "check every byte of a checkpoint, or of every step in a folder",
    "skills": "guides for coding agents: install them, keep them up to date",
    "train": "the reference training run, on workers of this machine",
    "version": "what is installed",
}

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        prepare_streams()
        if hasattr(signal, "SIGPIPE"):
            # A reader that has seen enough, such as `head`, is no error.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        try:
            status = _status(given)
        finally:
            # Python would do this as it ends, and print a traceback where it fails.
            sys.stdout.flush()
    except OSError as error:
        return _ended(given, unwritten(error))
    return status


def _status(given: list[str]) -> int:
    """Exit status of a command, whose error has been printed."""
    try:
        return _run(given)
    except HoldfastError as error:
        return _ended(given, error)
    except ImportError as error:
        return _ended(given, not_installed(error, f"`holdfast {given[0]}`"))
    except KeyboardInterrupt:
        return INTERRUPTED


def _ended(given: Sequence[str], error: HoldfastError) -> int:
    """Say what went wrong; the exit status."""
    if "--debug" in given:
        import traceback  # Not at the top: a verb that goes well need not wait for it.

        say_error(traceback.format_exc().rstrip())
    say_error(f"error: {error}")
    return error.exit_status


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        arguments = ["version", *arguments[1:]]
    what, example = "Checkpoints of PyTorch training runs.", "holdfast list outputs/checkpoint"
    verb = verb_in("holdfast", VERBS, arguments, what, example)
    if verb is None:
        return 0
    # Each verb is imported when it is asked for: `list` must not wait for what others need.
    status: int = import_module(f"holdfast.cli.{verb}").run(arguments[1:])
    return status
