"""`holdfast VERB ...`: finds the verb, and says what went wrong.

stdout holds what was asked for, stderr all else; the exit status is that of the error
(holdfast.errors).
"""

from __future__ import annotations

import difflib
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from holdfast.errors import HoldfastError, UsageError

VERBS = {
    "convert": "a checkpoint into another format: dcp, hf, torch",
    "list": "the steps in a checkpoint folder, and which one a resume takes",
    "verify": "check every byte of a checkpoint, or of every step in a folder",
    "version": "what is installed",
}

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if hasattr(signal, "SIGPIPE") and arguments is None:
        # A reader that has seen enough, such as `head`, is no error.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        return _run(given)
    except HoldfastError as error:
        if "--debug" in given:
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else ""
    if verb in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if verb == "--version":
        verb = "version"
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise UsageError(
            f"`{verb}` is no verb of holdfast" if verb else "which verb?",
            hint=f"did you mean `holdfast {near[0]}`?" if near else f"verbs: {', '.join(VERBS)}",
        )
    # Each verb is imported when it is asked for: `list` must not wait for what others need.
    status: int = import_module(f"holdfast.cli.{verb}").run(arguments[1:])
    return status


def _help() -> str:
    lines = ["usage: holdfast VERB ...", "", "Checkpoints of PyTorch training runs.", ""]
    lines += [f"  {verb:<9} {what}" for verb, what in VERBS.items()]
    return "\n".join([*lines, "", "`holdfast VERB --help` says more, with an example.", ""])
