"""One process of a run: its log, and how its errors become messages and exit statuses."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

from holdfast.errors import HoldfastError, StorageError, UsageError
from holdfast.trainer.config import Config
from holdfast.trainer.parallel import Meeting, join, meet
from holdfast.trainer.train import train

COLLATERAL_S = 0.5
"""How long a failed worker waits before it says so. Where it failed because another one had, the
launcher ends it in the meantime, and the cause is not buried under its consequences."""


def work(config: Config, is_first: Callable[[], bool] | None = None) -> int:
    """Train as one worker of the run; the exit status. Collective.

    The first worker that fails says so, whichever it is and however early. `is_first` tells, once,
    whether this one is; without it the store of the run does, as soon as it is there.
    `LOG_RANK` in the environment names the ranks that log, comma-separated (default: 0).
    """
    rank = os.environ.get("RANK", "0")
    set_up_log(rank in os.environ.get("LOG_RANK", "0").replace(" ", "").split(","))
    if config.training.deterministic:
        # Read when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    meeting: Meeting | None = None
    try:
        meeting = meet()
        with join(config, meeting) as place:
            train(config, place)
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:
        # A signal has stopped the run; the manager has saved what there was time for.
        return int(ended.code or 0)
    except (HoldfastError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        found = _worded(error)
        if is_first() if is_first is not None else _is_first_of(meeting):
            if config.job.debug:
                traceback.print_exc()
            sys.stderr.write(f"error: {found}\n")
        time.sleep(COLLATERAL_S)
        return found.exit_status
    except Exception:  # noqa: BLE001 - the end of the process: all that is left is to say so
        time.sleep(COLLATERAL_S)
        if is_first() if is_first is not None else _is_first_of(meeting):
            sys.stderr.write(f"rank {rank} failed:\n{traceback.format_exc()}")
        return 1
    return 0


def _worded(error: Exception) -> HoldfastError:
    """What is said of an error that the machine has, and no program is to blame for."""
    match error:
        case HoldfastError():
            return error
        case OSError():
            return StorageError(
                f"the run cannot go on: {error}",
                hint="is there space, and is it yours to write? All of a run lies below "
                "`job.dump_folder`; `--job.debug` shows where this came from",
            )
    said = str(error).strip().splitlines() or [type(error).__name__]
    return UsageError(
        f"there is not enough memory: {said[0]}",
        hint="a lower `training.local_batch_size` or `training.seq_len`, or "
        "`--activation_checkpoint.mode full`, takes less; `--job.debug` shows where this came from",
    )


def set_up_log(speaks: bool) -> None:
    """Send the log to standard output, in colour on a terminal; nowhere where `speaks` is false."""
    logger = logging.getLogger("holdfast")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    handler: logging.Handler = logging.NullHandler()
    if speaks and sys.stdout.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(show_path=False, omit_repeated_times=False, log_time_format="%X")
    elif speaks:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]


def _is_first_of(meeting: Meeting | None) -> bool:
    """Whether no other rank has reported a failure yet, as far as this one can know."""
    if meeting is None:
        # It is alone, or has not found the others: one message too many is better than none.
        return True
    try:
        return bool(meeting.store.add("failures", 1) == 1)
    except dist.DistError:
        # Whoever held the store is gone, and reported if it could.
        return meeting.rank == 0
