"""Metrics of a run: log lines, rows of `metrics.jsonl`, TensorBoard events."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from holdfast import accelerator
from holdfast.dashboard.history import METRICS, MetricsRow
from holdfast.errors import UsageError
from holdfast.manager.goodput import Timings
from holdfast.trainer.config import MetricsConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger: logging.Logger = logging.getLogger("holdfast.trainer")


class Metrics:
    """Writer of metrics; only the first rank writes files."""

    def __init__(self, config: MetricsConfig, folder: Path, *, first_rank: bool, step: int) -> None:
        """Open the files in `folder` for a run that starts at `step`.

        Rows are appended to `metrics.jsonl`. A resume may write rows for the same steps again: the
        last row of a step counts.
        """
        self._file = None
        self._last: MetricsRow | None = None
        self._board: SummaryWriter | None = None
        if config.enable_tensorboard and importlib.util.find_spec("tensorboard") is None:
            # Checked on every rank, so that all ranks stop.
            raise UsageError(
                "`metrics.enable_tensorboard` needs the package `tensorboard`, which is not "
                "installed",
                hint="pip install 'holdfast[tensorboard]'",
            )
        if not first_rank:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / METRICS).open("ab")
        if self._file.tell() and not _ends_line(folder / METRICS):
            # A killed run can leave half a row: the next row must not continue that line.
            self._file.write(b"\n")
        if config.enable_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # `purge_step` hides events of later steps, which the run wrote before this resume.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def report(self, row: MetricsRow, device: torch.device) -> None:
        """Log `row`, and write it to the files."""
        logger.info(
            "step %d  loss %.4f  grad_norm %.3f  lr %.3g  %s tokens/s  memory %.2f GiB",
            row.step,
            row.loss,
            row.grad_norm,
            row.lr,
            f"{row.tokens_per_s:,.0f}",
            memory_bytes(device) / 2**30,
        )
        self._last = row
        self._write(row)
        if self._board is not None:
            for name in ("loss", "grad_norm", "lr", "tokens_per_s", "save_blocked_s"):
                self._board.add_scalar(name, getattr(row, name), row.step)

    def close(self, timings: Timings) -> None:
        """Close the files. If there are `timings`, first write the last row again with them."""
        if self._last is not None and timings != Timings():
            self._write(with_timings(self._last, timings))
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, row: MetricsRow) -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(row)).encode() + b"\n")
            self._file.flush()


def with_timings(row: MetricsRow, timings: Timings) -> MetricsRow:
    """Return `row` with the timings of saves and loads, and the number of failed saves, added."""
    return replace(
        row,
        saves=(*row.saves, *timings.saves),
        loads=(*row.loads, *timings.loads),
        failed_saves=row.failed_saves + timings.failed_saves,
    )


def memory_bytes(device: torch.device) -> int:
    """Return this process's peak memory on `device`, in bytes."""
    if device.type != "cpu":
        return accelerator.memory_bytes_max(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
