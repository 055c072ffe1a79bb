"""One process of a run: its log, its error messages and its exit status."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from holdfast.errors import HoldfastError, StorageError, UsageError
from holdfast.trainer.config import Config
from holdfast.trainer.parallel import connect, init_parallel
from holdfast.trainer.train import train

COLLATERAL_S = 0.5
"""Seconds that a failed worker waits before it exits. If another worker failed first, the launcher
kills the waiting one meanwhile, so that its error does not hide the first error."""


def work(config: Config, is_first_error: Callable[[], bool] | None = None) -> int:
    """Train as one worker of the run, and return the exit status. Collective.

    Only the first worker that fails prints its error. `is_first_error` returns whether this worker
    is the first; by default, the store of the process group decides. `LOG_RANK` in the environment
    lists the ranks that log, comma-separated (default: 0).
    """
    rank = os.environ.get("RANK", "0")
    set_up_log(rank in os.environ.get("LOG_RANK", "0").replace(" ", "").split(","))
    if config.training.deterministic:
        # CUDA reads this variable when it is initialized.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    store: Store | None = None
    try:
        store = connect()
        with init_parallel(config, store) as parallel:
            train(config, parallel)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        # After a signal: the manager has saved a checkpoint if the deadline allowed it.
        return int(stop.code or 0)
    except (HoldfastError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        message = _as_holdfast_error(error)
        if is_first_error() if is_first_error else _is_first_in_store(store):
            if config.job.debug:
                traceback.print_exc()
            sys.stderr.write(f"error: {message}\n")
        time.sleep(COLLATERAL_S)
        return message.exit_status
    except Exception:  # noqa: BLE001 - the process ends here: no caller could report it
        time.sleep(COLLATERAL_S)
        if is_first_error() if is_first_error else _is_first_in_store(store):
            sys.stderr.write(f"rank {rank} failed:\n{traceback.format_exc()}")
        return 1
    return 0


def _as_holdfast_error(error: Exception) -> HoldfastError:
    """Convert an error of the machine, such as a full disk, to one with a message and a hint."""
    match error:
        case HoldfastError():
            return error
        case OSError():
            return StorageError(
                f"the run cannot continue: {error}",
                hint="check free space and write permission in `job.dump_folder`, to which a run "
                "writes all its files; `--job.debug` shows the traceback",
            )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UsageError(
        f"out of memory: {lines[0]}",
        hint="lower `training.local_batch_size` or `training.seq_len`, or recompute activations "
        "with `--activation_checkpoint.mode full`; `--job.debug` shows the traceback",
    )


def set_up_log(enabled: bool) -> None:
    """Log to standard output, in colour on a terminal; discard the log if not `enabled`."""
    logger = logging.getLogger("holdfast")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    handler: logging.Handler = logging.NullHandler()
    if enabled and sys.stdout.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(show_path=False, omit_repeated_times=False, log_time_format="%X")
    elif enabled:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]


def _is_first_in_store(store: Store | None) -> bool:
    """Return whether this rank is the first to call this function, as far as `store` can tell."""
    if store is None:
        # A single process, or one that could not connect. Two messages are better than none.
        return True
    try:
        return bool(store.add("failures", 1) == 1)
    except dist.DistError:
        # The process that served the store is gone, and has reported its error if it could.
        return os.environ.get("RANK", "0") == "0"
