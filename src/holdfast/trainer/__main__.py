"""`python -m holdfast.trainer`: one worker of a run, alone or under `torchrun`."""

from __future__ import annotations

import os
import sys

from holdfast.arguments import not_installed
from holdfast.errors import HoldfastError
from holdfast.trainer.arguments import prepare_start, print_requested_help, read_config, report


def main(arguments: list[str]) -> int:
    """Train with the settings in `arguments`, and return the exit status."""
    print_requested_help(arguments, "python -m holdfast.trainer")
    try:
        config = read_config(arguments)
        config.check(int(os.environ.get("WORLD_SIZE", "1")))
    except HoldfastError as error:
        return report(error)
    prepare_start(config, arguments)
    try:
        # Not at the top, since importing torch takes seconds, and `--help` and errors in the
        # settings do not need it.
        from holdfast.trainer.worker import work
    except ImportError as error:
        return report(not_installed(error, "training"))
    return work(config)


if __name__ == "__main__":
    status: int = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # After a failure other ranks may be gone: a normal exit could wait for them forever.
    if status:
        os._exit(status)
