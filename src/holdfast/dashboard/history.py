"""Read the history of a run: its checkpoints, and the metrics that it wrote during training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from holdfast.catalog.catalog import location
from holdfast.catalog.listing import CheckpointRow, resumable, row_of, survey
from holdfast.catalog.paths import full_path, open_for_reading
from holdfast.catalog.tier import TierView, host_stores, read_tier, view_tier
from holdfast.errors import HoldfastError
from holdfast.format import timings
from holdfast.format.names import hidden_folder_of
from holdfast.format.untrusted import SIZE_MAX
from holdfast.storage.objects import ObjectStore
from holdfast.storage.store import ReadStore, Stamping
from holdfast.timing import Times

METRICS = "metrics.jsonl"
METRICS_BYTES_MAX = 256 << 20

HEAD_BYTES = 256
"""Bytes at the beginning of a metrics file. If they change, the file was replaced."""

TRAINER_STATE = "trainer_state.json"
"""File in which transformers' Trainer keeps its log, inside each of its checkpoints."""

TRAINER_STATE_BYTES_MAX = 32 << 20


@dataclass(frozen=True, slots=True)
class MetricsRow:
    """Metrics of one step: a line of `metrics.jsonl`."""

    step: int
    loss: float
    """Mean loss over every token of the step, on all ranks."""

    grad_norm: float
    """Norm of all gradients, before clipping."""

    lr: float
    tokens_per_s: float
    """Tokens per second over all ranks, since the previous row."""

    save_blocked_s: float
    """Seconds that training waited for saves since the previous row."""

    time: float
    """Unix time in seconds."""

    saves: tuple[Times, ...] = ()
    """Saves that became durable since the previous row."""

    loads: tuple[Times, ...] = ()
    """Loads since the previous row. The first row after a resume has one."""

    failed_saves: int = 0
    """Number of saves that failed since the previous row."""


@dataclass(frozen=True, slots=True)
class TrainerLog:
    """Log in the newest checkpoint of transformers' Trainer."""

    losses: Sequence[tuple[int, float]] = ()
    """Step and loss of each line that has a loss."""

    is_finished: bool = False
    """Whether the run has reached its last step."""


@dataclass(frozen=True, slots=True)
class History:
    """Checkpoints and metrics of a run."""

    where: str
    rows: Sequence[CheckpointRow]
    """Checkpoints, oldest first, then those that only the fast tier has, then unfinished saves."""

    reports: Sequence[MetricsRow]
    """Lines of `metrics.jsonl` in file order. After a resume, some steps occur a second time."""

    trainer: TrainerLog = TrainerLog()
    """Log of transformers' Trainer; empty for other runs."""

    written_at: float | None = None
    """Unix time of the last change in an unfinished save; None without such a save."""

    tier: TierView | None = None
    """Fast tier of the run, as far as this machine sees it; None if the run has no fast tier."""

    @property
    def resume(self) -> int | None:
        """Step that a resume would load."""
        return resumable(self.rows)

    @property
    def newest(self) -> CheckpointRow | None:
        """Checkpoint that a resume would load."""
        resume = self.resume
        return next((row for row in self.rows if row.step is not None and row.step == resume), None)

    @property
    def written(self) -> Sequence[tuple[str, int]]:
        """Data files of the newest good checkpoint, each with its size in bytes."""
        good = [row for row in self.rows if row.state == "good" and row.step is not None]
        return [*good[-1].files.items()] if good else []

    @property
    def current(self) -> list[MetricsRow]:
        """Metrics of each step, sorted by step: the last line of that step in `metrics.jsonl`."""
        last = {report.step: report for report in self.reports}
        return [last[step] for step in sorted(last)]

    @property
    def distinct(self) -> list[MetricsRow]:
        """Metrics in file order, without repetitions.

        A run may write its last line twice, the second time with more saves. Then only the second
        line counts.
        """
        last = {(report.step, report.time): report for report in self.reports}
        return [*last.values()]

    @property
    def saves(self) -> list[Times]:
        """Times of the last save of each step, sorted by step.

        If a save is not in `metrics.jsonl`, use the timings in the manifest of its checkpoint,
        which lack the commit.
        """
        last = {}
        for row in self.rows:
            if row.step is not None and row.timings:
                seconds = sum(stage.most for stage in row.timings.values())
                last[row.step] = Times(row.step, row.written_nbytes or 0, seconds, row.timings)
        last |= {save.step: save for report in self.reports for save in report.saves}
        return [last[step] for step in sorted(last)]

    @property
    def loads(self) -> list[Times]:
        """Times of the loads in `metrics.jsonl`, in file order."""
        return [load for report in self.distinct for load in report.loads]

    @property
    def gone(self) -> list[tuple[int, float]]:
        """Steps whose checkpoint was deleted, with the time at which the run reported the save."""
        present = {row.step for row in self.rows}
        saved = {save.step: report for report in self.reports for save in report.saves}
        return [(step, saved[step].time) for step in sorted(saved) if step not in present]


def blocked(history: History) -> tuple[float, float]:
    """Return the seconds that training waited for saves, and their share of the running time.

    The time between the last metrics before a resume and the first ones after it does not count.
    """
    blocked_s, running_s = 0.0, 0.0
    for before, record in pairwise(history.reports):
        if record.step > before.step:
            blocked_s += record.save_blocked_s
            running_s += max(record.time - before.time, 0.0)
    return blocked_s, blocked_s / running_s if running_s else 0.0


def commit_time(row: CheckpointRow) -> float | None:
    """Return the Unix time at which a checkpoint was committed; None if unknown."""
    try:
        created = datetime.fromisoformat(row.created or "")
    except ValueError:
        return None
    return created.timestamp() if created.tzinfo is not None else None


def slowest(times: Times) -> int:
    """Return the rank for which the others waited: the slowest rank of the longest stage.

    Ignore the commit, in which the fastest rank spends the most time waiting for the others.
    """
    stages = {name: stage for name, stage in times.stages.items() if name != "commit"}
    return max((stages or times.stages).values(), key=lambda stage: stage.most).slowest


class HistoryReader:
    """Reads the history of a run repeatedly, each time only what has changed.

    Checkpoints whose files have not changed, and lines of metrics, are not read again. In a bucket,
    the reader finds changes by listing the whole folder, with one request per thousand objects. At
    other URLs it cannot notice changes, so it reads all checkpoints each time.
    """

    def __init__(self, path: str) -> None:
        """`path`: folder into which the run saves."""
        self._path = path
        self._rows: dict[str, tuple[object, CheckpointRow]] = {}
        self._metrics = _MetricsReader()
        self._trainer: tuple[object, TrainerLog] = (None, TrainerLog())
        self._history: History | None = None
        self._listed: tuple[ObjectStore, Callable[[], None]] | None = None
        self._known_damaged: set[str] = set()
        self._tier: tuple[object, TierView | None] = (None, None)

    def read(self) -> History:
        """Read the history, without tensors. Return the last object again if nothing has changed.

        Raises:
            NotFoundError: no such folder, or no checkpoint in it.
        """
        store, name = self._open()
        rows = self._survey(store, name)
        damaged = {row.name for row in rows if row.state in ("damaged", "unreadable")}
        if damaged - self._known_damaged and self._listed is not None:
            # Other processes may have replaced or deleted these checkpoints since the listing.
            self._listed[1]()
            rows = self._survey(store, name)
            damaged = {row.name for row in rows if row.state in ("damaged", "unreadable")}
        self._known_damaged = damaged
        reports = self._metrics.read(store, name)
        trainer = TrainerLog() if reports else self._trainer_log(store, name, rows)
        written_at = _written_at(store, name, rows)
        tier = self._tier_of(store, name)
        history = History(location(store, name), rows, reports, trainer, written_at, tier)
        if self._history is None or history != self._history:
            self._history = history
        return self._history

    def read_metrics(self) -> History:
        """Return a history of metrics alone, for a run that has not saved yet."""
        store, name = self._open()
        return History(location(store, name), (), self._metrics.read(store, name))

    def _open(self) -> tuple[ReadStore, str]:
        if self._listed is not None:
            self._listed[1]()
            return self._listed[0], full_path(self._path).rpartition("/")[2]
        store, name = open_for_reading(self._path)
        if not isinstance(store, ObjectStore):
            return store, name
        self._listed = store.listed(below=name)
        return self._open()

    def _survey(self, store: ReadStore, name: str) -> list[CheckpointRow]:
        before, self._rows = self._rows, {}

        def cached_row(listed: ReadStore, key: str) -> CheckpointRow:
            stamp = _stamp(store, key)
            old_stamp, row = before.get(key, (None, None))
            # In a bucket, `damaged` may be due to a failed request, so read the checkpoint again.
            # A file that could not be read has the same stamp once it can.
            unsure = ("unreadable",) if self._listed is None else ("damaged", "unreadable")
            is_sure = row is not None and row.state not in unsure
            if row is None or old_stamp != stamp or not is_sure:
                row = row_of(listed, key)
            self._rows[key] = stamp, row
            return row

        return survey(store, name, cached_row)

    def _tier_of(self, store: ReadStore, name: str) -> TierView | None:
        """Describe the fast tier of a run; None if it has none, or cannot be read.

        Manifests are read again only after a change.
        """
        try:
            record = read_tier(store, name)
            if record is None:
                return None
            stores = host_stores(record)
            stamp = {host: found.stamp("") for host, found in stores.items()}
        except HoldfastError:
            return None
        if stamp != self._tier[0]:
            self._tier = stamp, view_tier(stores)
        return self._tier[1]

    def _trainer_log(
        self, store: ReadStore, name: str, rows: Sequence[CheckpointRow]
    ) -> TrainerLog:
        """Read the log of transformers' Trainer in the newest checkpoint that has one.

        Return the log of the last call if that checkpoint is damaged, or if none has a log.
        """
        newest = next((row for row in reversed(rows) if TRAINER_STATE in row.files), None)
        if newest is None or newest.state != "good":
            return self._trainer[1]
        key = f"{name}/{newest.name}"
        stamp, _ = self._rows[key]
        if stamp != self._trainer[0]:
            self._trainer = stamp, _read_trainer_log(store, f"{key}/{TRAINER_STATE}")
        return self._trainer[1]


def _written_at(store: ReadStore, name: str, rows: Sequence[CheckpointRow]) -> float | None:
    """Return the Unix time at which an unfinished save last changed.

    Return None if there is no such save, or if its time is unknown.
    """
    times = []
    for row in rows:
        hidden = hidden_folder_of(row.name) if row.state == "attempt" else None
        if hidden is not None and hidden.role == "attempt" and isinstance(store, Stamping):
            with suppress(HoldfastError):
                times.append(store.changed_at(f"{name}/{row.name}"))
    return max(times, default=None)


def _read_trainer_log(store: ReadStore, key: str) -> TrainerLog:
    """Read the log of transformers' Trainer. Return an empty log if that fails."""
    try:
        nbytes = store.size(key)
        if nbytes > TRAINER_STATE_BYTES_MAX:
            return TrainerLog()
        state: Any = json.loads(store.read(key, 0, nbytes))
        log = [(line["step"], line["loss"]) for line in state["log_history"] if "loss" in line]
        losses = [(step, float(loss)) for step, loss in log if _is_count(step)]
        return TrainerLog(losses, 0 < state["max_steps"] <= state["global_step"])
    except (HoldfastError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return TrainerLog()


def _stamp(store: ReadStore, key: str) -> object:
    """Return a value that stays equal while no file of a checkpoint changes.

    If the store cannot notice changes, each value differs from all others.
    """
    if isinstance(store, Stamping):
        with suppress(HoldfastError):
            return store.stamp(key)
    return object()


class _MetricsReader:
    """Reads the metrics of a run repeatedly, each time only the new lines of the file.

    The file is beside the folder of checkpoints, or in it.
    """

    def __init__(self) -> None:
        self._records: list[MetricsRow] = []
        self._key, self._head, self._offset = "", b"", 0

    def read(self, store: ReadStore, name: str) -> list[MetricsRow]:
        """Read the new lines, and return the rows of all lines; empty if there is no such file."""
        above = name.rpartition("/")[0]
        for key in (f"{above}/{METRICS}" if above else METRICS, f"{name}/{METRICS}"):
            with suppress(HoldfastError):
                return self._read(store, key)
        return []

    def _read(self, store: ReadStore, key: str) -> list[MetricsRow]:
        nbytes = min(store.size(key), METRICS_BYTES_MAX)
        head = store.read(key, 0, HEAD_BYTES)
        if (key, head[: len(self._head)]) != (self._key, self._head) or nbytes < self._offset:
            self._records, self._key, self._offset = [], key, 0
        self._head = head
        data = store.read(key, self._offset, nbytes)
        *lines, rest = data.split(b"\n")
        # The rest may be half of a line that is being written, so it is read again next time.
        self._offset += len(data) - len(rest)
        # Make a new list, since earlier histories refer to the old one.
        if new := [record for record in map(_record, lines) if record is not None]:
            self._records = [*self._records, *new]
        last = _record(rest)
        return self._records if last is None else [*self._records, last]


def _record(line: bytes) -> MetricsRow | None:
    """Decode one line; None if the line is cut off, or is not a row of metrics."""
    try:
        row: Any = json.loads(line)
        if not _is_count(row["step"]):
            return None
        return MetricsRow(
            step=row["step"],
            loss=float(row["loss"]),
            grad_norm=float(row.get("grad_norm", "nan")),
            lr=float(row.get("lr", "nan")),
            tokens_per_s=float(row["tokens_per_s"]),
            save_blocked_s=float(row["save_blocked_s"]),
            time=float(row["time"]),
            saves=tuple(map(_times, row.get("saves", ()))),
            loads=tuple(map(_times, row.get("loads", ()))),
            failed_saves=int(row.get("failed_saves", 0)),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _times(row: Any) -> Times:
    stages = timings.decode(row["stages"])
    if not stages or not _is_count(row["step"]) or not _is_count(row["nbytes"]):
        raise ValueError("no save")
    return Times(row["step"], row["nbytes"], float(row["seconds"]), stages)


def _is_count(value: Any) -> bool:
    # Rates and charts are computed with floats, which cannot hold arbitrarily large integers.
    return type(value) is int and 0 <= value <= SIZE_MAX
