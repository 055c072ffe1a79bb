"""`python -m holdfast.trainer`: one worker of a run, alone or under `torchrun`."""

from __future__ import annotations

import os
import sys

from holdfast.arguments import not_installed
from holdfast.errors import HoldfastError
from holdfast.trainer.arguments import get_ready, print_help, read_config, wants_help


def main(arguments: list[str]) -> int:
    """Train as `arguments` say; the exit status."""
    if wants_help(arguments):
        print_help("python -m holdfast.trainer")
    try:
        config = read_config(arguments)
        config.check(int(os.environ.get("WORLD_SIZE", "1")))
    except HoldfastError as error:
        return _ended(error)
    get_ready(config, arguments)
    try:
        # Imports torch, for which neither `--help` nor a wrong setting has to wait.
        from holdfast.trainer.worker import work
    except ImportError as error:
        return _ended(not_installed(error, "training"))
    return work(config)


def _ended(error: HoldfastError) -> int:
    """Say what is wrong; the exit status. All workers of a machine find the same mistake, and one
    of them says so; on another machine its files may differ."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        sys.stderr.write(f"error: {error}\n")
    return error.exit_status


if __name__ == "__main__":
    status: int = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # After a failure other ranks may be gone: shutting down in order could wait for them forever.
    if status:
        os._exit(status)
