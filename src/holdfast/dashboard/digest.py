"""Answers for programs: JSON, health, and metrics in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from holdfast.catalog.listing import used_bytes
from holdfast.dashboard.history import History, WatchedFolder, commit_time
from holdfast.dashboard.page import blocked
from holdfast.spelling import finite

STATES = ("good", "damaged", "attempt")


def age_s(history: History, now: datetime) -> float | None:
    """Returns the age in seconds of the checkpoint that a resume takes; None where unknown."""
    time = None if history.newest is None else commit_time(history.newest)
    return None if time is None else max(now.timestamp() - time, 0.0)


def digest(run: WatchedFolder, now: datetime, *, full: bool) -> dict[str, Any]:
    """Returns a run as JSON: a summary, or the `full` history."""
    latest = run.latest
    result: dict[str, Any] = {
        "folder": run.folder,
        "problem": latest.problem,
        "looked_at": latest.time,
    }
    if latest.history is None:
        return result
    history = latest.history
    result |= {"resume": history.resume, "age_s": age_s(history, now)}
    result |= {state: _count(history, state) for state in STATES}
    last = history.current[-1:]
    result["report"] = asdict(last[0]) if last else None
    if full:
        result["checkpoints"] = [asdict(row) for row in history.rows]
        result["saves"] = [asdict(times) for times in history.saves]
        result["loads"] = [asdict(times) for times in history.loads]
        result["removed"] = [step for step, _ in history.gone]
    spelled: dict[str, Any] = finite(result)
    return spelled


def unhealthy(
    runs: Sequence[WatchedFolder], now: datetime, max_age_s: float | None
) -> dict[str, str]:
    """Returns the folder of each run without a recent good checkpoint, and the reason."""
    return {run.folder: why for run in runs if (why := _unhealthy(run, now, max_age_s))}


def _unhealthy(run: WatchedFolder, now: datetime, max_age_s: float | None) -> str | None:
    history = run.latest.history
    if history is None:
        return run.latest.problem
    if history.newest is None:
        return "no step to resume from"
    age = age_s(history, now)
    if max_age_s is None or (age is not None and age <= max_age_s):
        return None
    if age is None:
        return f"step {history.resume} does not say when it was saved"
    return f"step {history.resume} is {age:.0f} s old, the limit is {max_age_s:.0f} s"


def exposition(runs: Sequence[WatchedFolder], now: datetime) -> tuple[bytes, str]:
    """Returns the metrics of all runs, and their content type."""
    registry = CollectorRegistry()
    registry.register(_Metrics(runs, now))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Metrics(Collector):
    def __init__(self, runs: Sequence[WatchedFolder], now: datetime) -> None:
        self._runs, self._now = {run.folder: run for run in runs}, now

    def collect(self) -> Iterable[Metric]:
        """Returns every metric, with a sample for each run that has it."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for folder, run in self._runs.items():
            for kind, name, help_text, value, labels in _samples(run, self._now):
                if name not in families:
                    families[name] = kind(f"holdfast_{name}", help_text, labels=["folder", *labels])
                label = folder.encode(errors="replace").decode()
                families[name].add_metric([label, *labels.values()], value)
        return families.values()


Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]
Sample = tuple[Kind, str, str, float, dict[str, str]]
"""Kind, name, help text, value, labels."""


def _samples(run: WatchedFolder, now: datetime) -> Iterator[Sample]:
    gauge, history = GaugeMetricFamily, run.latest.history
    up = float(history is not None)
    yield gauge, "up", "Whether the folder can be read and holds checkpoints.", up, {}
    read_at = "When the folder was last read."
    yield gauge, "last_look_timestamp_seconds", read_at, run.latest.time, {}
    if history is None:
        return
    newest = history.newest
    if newest is not None and newest.step is not None:
        yield gauge, "newest_good_step", "Step that a resume takes.", newest.step, {}
        committed, age = commit_time(newest), age_s(history, now)
        if committed is not None and age is not None:
            when = "When that step was committed."
            yield gauge, "newest_good_timestamp_seconds", when, committed, {}
            yield gauge, "newest_good_age_seconds", "Time since that commit.", age, {}
    for state in STATES:
        count = _count(history, state)
        yield gauge, "checkpoints", "Folders, by state.", count, {"state": state}
    nbytes = used_bytes(history.rows)
    yield gauge, "checkpoint_bytes", "Bytes of all checkpoints.", nbytes, {}
    if history.reports:
        yield from _reported(history)


def _reported(history: History) -> Iterator[Sample]:
    """Yields samples of the metrics that the run wrote, summed over its starts and resumes."""
    records, loads, counter = history.distinct, history.loads, CounterMetricFamily
    saves = [save for record in records for save in record.saves]
    step = history.reports[-1].step
    yield GaugeMetricFamily, "step", "Step that the run has reached.", step, {}
    for name, help_text, value in (
        ("saves", "Saves that became durable.", len(saves)),
        ("saved_bytes", "Bytes written by saves.", sum(save.nbytes for save in saves)),
        ("save_seconds", "Time from plan to durable.", sum(save.seconds for save in saves)),
        ("save_blocked_seconds", "Time that training waited for saves.", blocked(history)[0]),
        ("failed_saves", "Saves that failed.", sum(record.failed_saves for record in records)),
        ("loads", "Resumes.", len(loads)),
        ("load_seconds", "Time of resumes.", sum(load.seconds for load in loads)),
    ):
        yield counter, name, help_text, value, {}
    stages = dict.fromkeys((name for save in saves for name in save.stages), 0.0)
    for save in saves:
        for name, stage in save.stages.items():
            stages[name] += stage.most
    for name, seconds in stages.items():
        help_text = "Time of each stage, of its slowest rank."
        yield counter, "save_stage_seconds", help_text, seconds, {"stage": name}


def _count(history: History, state: str) -> int:
    return sum(row.state == state for row in history.rows)
