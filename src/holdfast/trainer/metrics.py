"""What a run says while it runs: a line of log, a row of `metrics.jsonl`, TensorBoard events."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from holdfast.errors import UsageError
from holdfast.manager.goodput import Timings
from holdfast.timing import Times
from holdfast.trainer.config import MetricsConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger: logging.Logger = logging.getLogger("holdfast.trainer")


@dataclass(frozen=True, slots=True)
class MetricsRow:
    """What is known about one step: a line of `metrics.jsonl`."""

    step: int
    """Optimizer steps done."""

    loss: float
    """Mean over every token of the step, on all ranks."""

    grad_norm: float
    """Norm of all gradients, before clipping."""

    lr: float
    """Learning rate of the step."""

    tokens_per_s: float
    """Over all ranks, since the row before."""

    save_blocked_s: float
    """How long saving held up training since the row before."""

    time: float
    """Seconds since 1970."""

    saves: tuple[Times, ...] = ()
    """Saves that have become durable since the row before, with the seconds of each stage."""

    loads: tuple[Times, ...] = ()
    """In the first row of a run that began with one."""

    failed_saves: int = 0
    """Saves that came to nothing since the row before."""

    def with_more(self, more: Timings) -> MetricsRow:
        """The same step, and what has come to its end since."""
        return replace(
            self,
            saves=(*self.saves, *more.saves),
            loads=(*self.loads, *more.loads),
            failed_saves=self.failed_saves + more.failed_saves,
        )


class Metrics:
    """Reports rows; on every rank but the first it does nothing."""

    def __init__(self, config: MetricsConfig, folder: Path, *, first_rank: bool, step: int) -> None:
        """`step` is where the run goes on from.

        `metrics.jsonl` is only ever added to. A run that was killed may have reported steps that
        are done again after the resume: of several rows of a step the last one counts.

        Raises:
            UsageError: TensorBoard is asked for and not installed.
        """
        self._file = None
        self._last: MetricsRow | None = None
        self._board: SummaryWriter | None = None
        if config.enable_tensorboard and importlib.util.find_spec("tensorboard") is None:
            # Asked on every rank, so that all of them stop.
            raise UsageError(
                "`metrics.enable_tensorboard` needs the package `tensorboard`, which is not "
                "installed",
                hint="pip install 'holdfast[tensorboard]'",
            )
        if not first_rank:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("ab")
        if self._file.tell() and not _ends_line(folder / "metrics.jsonl"):
            # A killed run can leave half a row; the next one starts on a line of its own.
            self._file.write(b"\n")
        if config.enable_tensorboard:
            self._board = _board(folder / "tensorboard", step)

    def report(self, row: MetricsRow, device: torch.device) -> None:
        """Log `row` and append it to the file."""
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

    def close(self, more: Timings | None = None) -> None:
        """Finish the files. Where there is more than the last row had, it is there again, with
        that."""
        if self._last is not None and more is not None and more != Timings():
            self._write(self._last.with_more(more))
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, row: MetricsRow) -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(row)).encode() + b"\n")
            self._file.flush()


class Clock:
    """Seconds and counts since the row before."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._blocked_s = 0.0
        self.tokens: int = 0

    def lap(self, blocked_s: float) -> tuple[float, float]:
        """Tokens per second and seconds blocked since the last call; `blocked_s` is a total."""
        now = time.perf_counter()
        result = self.tokens / max(now - self._since, 1e-9), blocked_s - self._blocked_s
        self._since, self._blocked_s, self.tokens = now, blocked_s, 0
        return result


def memory_bytes(device: torch.device) -> int:
    """The most that this process has taken so far, on its device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _board(folder: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    # Events past the step of a resume are hidden: the run that wrote them did not live on.
    return SummaryWriter(str(folder), purge_step=step + 1)
