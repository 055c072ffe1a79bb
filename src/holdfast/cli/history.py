"""What is known of a run: its steps, and what it has reported while it went on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.catalog.catalog import place, read_manifest
from holdfast.cli.list import Row, resumable, survey
from holdfast.engine.root import open_for_reading
from holdfast.errors import HoldfastError
from holdfast.storage.store import ReadStore

METRICS = "metrics.jsonl"
METRICS_BYTES_MAX = 256 << 20


@dataclass(frozen=True, slots=True)
class Save:
    """How long one save took."""

    step: int
    seconds: float
    stages: Sequence[tuple[str, float, int]]
    """Name, seconds of the slowest rank, and which one that was."""

    @property
    def slowest(self) -> int:
        """The rank that took the longest over its longest stage."""
        return max(self.stages, key=lambda stage: stage[1])[2]


@dataclass(frozen=True, slots=True)
class Report:
    """One line of `metrics.jsonl`."""

    step: int
    time: float
    """Seconds since 1970."""

    loss: float
    tokens_per_s: float
    save_blocked_s: float
    """How long saving held up training since the line before."""

    saves: tuple[Save, ...] = ()
    """Those that have become durable since the line before."""


@dataclass(frozen=True, slots=True)
class History:
    """Everything that a report tells of."""

    where: str
    rows: Sequence[Row]
    """Steps, oldest first, then what is none."""

    reports: Sequence[Report]
    """In the order in which they were written: steps that were done again are there again."""

    written: Sequence[tuple[str, int]]
    """Files of the newest good step with their bytes: what each rank has written."""

    @property
    def resume(self) -> int | None:
        return resumable(self.rows)

    @property
    def current(self) -> list[Report]:
        """Of several reports of a step the last one: what the run stands on."""
        last = {report.step: report for report in self.reports}
        return [last[step] for step in sorted(last)]

    @property
    def saves(self) -> list[Save]:
        """By step; of several of a step the last one."""
        found = {save.step: save for report in self.reports for save in report.saves}
        return [found[step] for step in sorted(found)]


def history_of(path: str) -> History:
    """What is known of the run that saves in the folder at `path`. Reads no data of any step.

    Raises:
        NotFoundError: no such folder, or none with a step.
    """
    store, name = open_for_reading(path)
    rows = survey(store, name)
    good = [row for row in rows if row.state == "good" and row.step is not None]
    written: list[tuple[str, int]] = []
    if good:
        try:
            written = [*read_manifest(store, f"{name}/{good[-1].name}").files.items()]
        except HoldfastError:
            written = []
    return History(place(store, name), rows, _reports(store, name), written)


def _reports(store: ReadStore, name: str) -> list[Report]:
    """From the file beside the folder, or in it; none where there is no such file."""
    above = name.rpartition("/")[0]
    for key in (f"{above}/{METRICS}" if above else METRICS, f"{name}/{METRICS}"):
        try:
            data = store.read(key, 0, min(store.size(key), METRICS_BYTES_MAX))
        except HoldfastError:
            continue
        found = (_report(line) for line in data.splitlines())
        return [report for report in found if report is not None]
    return []


def _report(line: bytes) -> Report | None:
    """The report on one line; None where it is cut off, or something else."""
    try:
        row: Any = json.loads(line)
        numbers = [row[key] for key in ("time", "loss", "tokens_per_s", "save_blocked_s")]
        if type(row["step"]) is not int:
            return None
        saves = tuple(map(_save, row.get("saves", ())))
        time, loss, tokens_per_s, save_blocked_s = map(float, numbers)
        return Report(row["step"], time, loss, tokens_per_s, save_blocked_s, saves)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _save(row: Any) -> Save:
    stages = [
        (str(name), float(spread["most"]), int(spread["slowest"]))
        for name, spread in row["stages"].items()
    ]
    if not stages:
        raise ValueError("a save without stages")
    return Save(int(row["step"]), float(row["seconds"]), stages)
