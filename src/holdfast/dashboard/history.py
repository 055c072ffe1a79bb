"""What is known of a run: its steps, and what it has reported while it went on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from holdfast.catalog.catalog import location
from holdfast.catalog.listing import CheckpointRow, resumable, row_of, survey
from holdfast.catalog.paths import open_for_reading
from holdfast.errors import HoldfastError
from holdfast.format import timings
from holdfast.storage.local import LocalStore
from holdfast.storage.store import ReadStore
from holdfast.timing import Times

METRICS = "metrics.jsonl"
METRICS_BYTES_MAX = 256 << 20

HEAD_BYTES = 256
"""Enough of a file's beginning to tell it from another one of the same name."""


@dataclass(frozen=True, slots=True)
class MetricsRecord:
    """One line of `metrics.jsonl`."""

    step: int
    time: float
    """Seconds since 1970."""

    loss: float
    tokens_per_s: float
    save_blocked_s: float
    """How long saving held up training since the line before."""

    saves: tuple[Times, ...] = ()
    """Those that have become durable since the line before."""

    loads: tuple[Times, ...] = ()
    failed_saves: int = 0


@dataclass(frozen=True, slots=True)
class History:
    """Everything that a report tells of."""

    where: str
    rows: Sequence[CheckpointRow]
    """Steps, oldest first, then what is none."""

    reports: Sequence[MetricsRecord]
    """In the order in which they were written: steps that were done again are there again."""

    @property
    def resume(self) -> int | None:
        return resumable(self.rows)

    @property
    def newest(self) -> CheckpointRow | None:
        """The step that a resume takes."""
        taken = self.resume
        steps = (row for row in self.rows if row.step is not None and row.step == taken)
        return next(steps, None)

    @property
    def written(self) -> Sequence[tuple[str, int]]:
        """Files of the newest good step with their bytes: what each rank has written."""
        good = [row for row in self.rows if row.state == "good" and row.step is not None]
        return [*good[-1].files.items()] if good else []

    @property
    def current(self) -> list[MetricsRecord]:
        """Of several reports of a step the last one: what the run stands on."""
        last = {report.step: report for report in self.reports}
        return [last[step] for step in sorted(last)]

    @property
    def lived(self) -> list[MetricsRecord]:
        """As they were written. The last row of a life may stand twice, the second time with more:
        then that one."""
        last = {(report.step, report.time): report for report in self.reports}
        return [*last.values()]

    @property
    def saves(self) -> list[Times]:
        """By step; of several of a step the last one. Where the run has reported nothing of it,
        what the step itself knows, which ends before the commit."""
        found = {times.step: times for times in map(_times_of, self.rows) if times is not None}
        found |= {save.step: save for report in self.reports for save in report.saves}
        return [found[step] for step in sorted(found)]

    @property
    def loads(self) -> list[Times]:
        """In the order of the run's lives."""
        return [load for report in self.lived for load in report.loads]

    @property
    def gone(self) -> list[tuple[int, float]]:
        """Steps that were saved and are not there any more, each with the time when its save was
        reported."""
        there = {row.step for row in self.rows}
        saved = {save.step: report for report in self.reports for save in report.saves}
        return [(step, saved[step].time) for step in sorted(saved) if step not in there]


def _times_of(row: CheckpointRow) -> Times | None:
    if row.step is None or not row.timings:
        return None
    seconds = sum(stage.most for stage in row.timings.values())
    return Times(row.step, row.nbytes or 0, seconds, row.timings)


def slowest(times: Times) -> int:
    """The rank that the others waited for: the slowest over the longest stage. In the commit all
    wait, the fastest for longest."""
    waited_for = {name: stage for name, stage in times.stages.items() if name != "commit"}
    return max((waited_for or times.stages).values(), key=lambda stage: stage.most).slowest


def history_of(path: str) -> History:
    """What is known of the run that saves in the folder at `path`. Reads no data of any step.

    Raises:
        NotFoundError: no such folder, or none with a step.
    """
    return Watch(path).look()


class Watch:
    """A folder of steps that is looked at again and again: steps whose files are as they were, and
    reports that were read, are not read again. Of URLs only the reports are known to be the same.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._rows: dict[str, tuple[object, CheckpointRow]] = {}
        self._reports = _MetricsRecords()

    def look(self) -> History:
        """As `history_of`, now."""
        store, name = open_for_reading(self._path)
        before, self._rows = self._rows, {}

        def look_at(store: ReadStore, key: str) -> CheckpointRow:
            stamp = _stamp(store, key)
            seen, row = before.get(key, (None, None))
            if row is None or seen != stamp:
                row = row_of(store, key)
            self._rows[key] = stamp, row
            return row

        rows = survey(store, name, look_at)
        return History(location(store, name), rows, self._reports.read(store, name))


def _stamp(store: ReadStore, key: str) -> object:
    """Equal to an earlier one for as long as no file of a step has changed; unlike any other where
    that cannot be known."""
    if isinstance(store, LocalStore):
        with suppress(HoldfastError):
            return store.stamp(key)
    return object()


class _MetricsRecords:
    """The lines of the file beside a folder, or in it; none where there is no such file."""

    def __init__(self) -> None:
        self._found: list[MetricsRecord] = []
        self._key, self._head, self._offset = "", b"", 0

    def read(self, store: ReadStore, name: str) -> list[MetricsRecord]:
        """All of them, those that are new from the file."""
        above = name.rpartition("/")[0]
        for key in (f"{above}/{METRICS}" if above else METRICS, f"{name}/{METRICS}"):
            try:
                return self._from(store, key)
            except HoldfastError:
                continue
        return []

    def _from(self, store: ReadStore, key: str) -> list[MetricsRecord]:
        nbytes = min(store.size(key), METRICS_BYTES_MAX)
        head = store.read(key, 0, HEAD_BYTES)
        if (key, head[: len(self._head)]) != (self._key, self._head) or nbytes < self._offset:
            self._found, self._key, self._offset = [], key, 0
        self._head = head
        data = store.read(key, self._offset, nbytes)
        lines = data.split(b"\n")
        # What follows the last end of a line may be half of one that is being written.
        self._offset += len(data) - len(lines[-1])
        self._found += [report for report in map(_report, lines[:-1]) if report is not None]
        last = _report(lines[-1])
        return [*self._found, last] if last is not None else [*self._found]


def _report(line: bytes) -> MetricsRecord | None:
    """The report on one line; None where it is cut off, or something else."""
    try:
        row: Any = json.loads(line)
        numbers = [row[key] for key in ("time", "loss", "tokens_per_s", "save_blocked_s")]
        if type(row["step"]) is not int:
            return None
        saves, loads = (tuple(map(_times, row.get(key, ()))) for key in ("saves", "loads"))
        time, loss, tokens_per_s, save_blocked_s = map(float, numbers)
        failed = int(row.get("failed_saves", 0))
        return MetricsRecord(
            row["step"], time, loss, tokens_per_s, save_blocked_s, saves, loads, failed
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _times(row: Any) -> Times:
    stages = timings.decode(row["stages"])
    if not stages:
        raise ValueError("a save without stages")
    return Times(int(row["step"]), int(row["nbytes"]), float(row["seconds"]), stages)
