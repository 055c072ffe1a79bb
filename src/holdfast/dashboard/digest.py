"""What is served for programs: JSON, health, and metrics in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from holdfast.dashboard.history import History
from holdfast.dashboard.page import blocked, committed
from holdfast.dashboard.watched import Watched
from holdfast.spelling import finite

STATES = ("good", "damaged", "attempt")


def age_s(history: History, now: datetime) -> float | None:
    """Seconds since the step that a resume takes was committed; None where there is none, or it
    does not say when."""
    newest = history.newest
    then = None if newest is None else committed(newest)
    return None if then is None else max(now.timestamp() - then, 0.0)


def digest(run: Watched, now: datetime, *, whole: bool) -> dict[str, Any]:
    """A run for programs; the `whole` of it, or what it comes to."""
    seen = run.seen
    said: dict[str, Any] = {"folder": run.folder, "problem": seen.problem, "looked_at": seen.time}
    if seen.history is None:
        return said
    history = seen.history
    said |= {"resume": history.resume, "age_s": age_s(history, now)}
    said |= {state: sum(row.state == state for row in history.rows) for state in STATES}
    last = history.current[-1:]
    said["report"] = asdict(last[0]) if last else None
    if whole:
        said["checkpoints"] = [asdict(row) for row in history.rows]
        said["saves"] = [asdict(times) for times in history.saves]
        said["loads"] = [asdict(times) for times in history.loads]
        said["removed"] = [step for step, _ in history.gone]
    spelled: dict[str, Any] = finite(said)
    return spelled


def health(
    runs: Sequence[Watched], now: datetime, max_age_s: float | None
) -> tuple[bool, dict[str, Any]]:
    """Whether every run has a good step that is young enough, and a line on each that has not."""
    wrong = {run.folder: why for run in runs if (why := _unhealthy(run, now, max_age_s))}
    return not wrong, {"healthy": not wrong, "problems": wrong}


def _unhealthy(run: Watched, now: datetime, max_age_s: float | None) -> str | None:
    history = run.seen.history
    if history is None:
        return run.seen.problem
    if history.newest is None:
        return "no step to resume from"
    age = age_s(history, now)
    if max_age_s is None or (age is not None and age <= max_age_s):
        return None
    if age is None:
        return f"step {history.resume} does not say when it was saved"
    return f"step {history.resume} is {age:.0f} s old, the limit is {max_age_s:.0f} s"


def exposition(runs: Sequence[Watched], now: datetime) -> tuple[bytes, str]:
    """The metrics of all runs, and their content type."""
    registry = CollectorRegistry()
    registry.register(_Metrics(runs, now))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Metrics(Collector):
    def __init__(self, runs: Sequence[Watched], now: datetime) -> None:
        self._runs, self._now = {run.folder: run for run in runs}, now

    def collect(self) -> Iterable[Metric]:
        """Every metric, with a sample for each run that knows it."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for folder, run in self._runs.items():
            for kind, name, what, value, labels in _samples(run, self._now):
                if name not in families:
                    families[name] = kind(f"holdfast_{name}", what, labels=["folder", *labels])
                named = folder.encode(errors="replace").decode()
                families[name].add_metric([named, *labels.values()], value)
        yield from families.values()


Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]
Sample = tuple[Kind, str, str, float, dict[str, str]]
"""Kind, name, what it is, value, labels."""


def _samples(run: Watched, now: datetime) -> Iterator[Sample]:
    gauge, seen = GaugeMetricFamily, run.seen
    history = seen.history
    up = float(history is not None)
    yield gauge, "up", "Whether the folder could be looked at, and holds steps.", up, {}
    looked = "When the folder was last looked at."
    yield gauge, "last_look_timestamp_seconds", looked, seen.time, {}
    if history is None:
        return
    newest = history.newest
    if newest is not None and newest.step is not None:
        yield gauge, "newest_good_step", "The step that a resume takes.", newest.step, {}
        then, age = committed(newest), age_s(history, now)
        if then is not None and age is not None:
            committed_at = "When that step was committed."
            yield gauge, "newest_good_timestamp_seconds", committed_at, then, {}
            yield gauge, "newest_good_age_seconds", "Since that step was committed.", age, {}
    for state in STATES:
        count = sum(row.state == state for row in history.rows)
        yield gauge, "checkpoints", "Folders, by state.", count, {"state": state}
    nbytes = sum(row.nbytes or 0 for row in history.rows)
    yield gauge, "checkpoint_bytes", "Of all that is kept.", nbytes, {}
    if history.reports:
        yield from _reported(history)


def _reported(history: History) -> Iterator[Sample]:
    """What the run itself has counted, over all its lives."""
    lived, loads, counter = history.lived, history.loads, CounterMetricFamily
    saves = [save for report in lived for save in report.saves]
    yield GaugeMetricFamily, "step", "Reached by the run.", history.reports[-1].step, {}
    for name, what, value in (
        ("saves", "Saves that became durable.", len(saves)),
        ("saved_bytes", "Written by them.", sum(save.nbytes for save in saves)),
        ("save_seconds", "From plan to durable.", sum(save.seconds for save in saves)),
        ("save_blocked_seconds", "Training waited for saves.", blocked(history)[0]),
        ("failed_saves", "Saves that came to nothing.", sum(r.failed_saves for r in lived)),
        ("loads", "Resumes.", len(loads)),
        ("load_seconds", "Taken by them.", sum(load.seconds for load in loads)),
    ):
        yield counter, name, what, value, {}
    stages = dict.fromkeys((name for save in saves for name in save.stages), 0.0)
    for save in saves:
        for name, stage in save.stages.items():
            stages[name] += stage.most
    for name, spent in stages.items():
        what = "By stage, of its slowest rank."
        yield counter, "save_stage_seconds", what, spent, {"stage": name}
