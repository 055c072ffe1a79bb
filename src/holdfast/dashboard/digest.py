"""Answers for programs: JSON, a health check, and metrics in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from holdfast.catalog.tier import TierView
from holdfast.dashboard.condition import STATES, Limits, age_s_of, condition_of
from holdfast.dashboard.figures import Figures
from holdfast.dashboard.watch import WatchedFolder
from holdfast.spelling import finite


def digest(run: WatchedFolder, now: datetime, limits: Limits, *, full: bool) -> dict[str, Any]:
    """Return a summary of a run for JSON. `full`: add its checkpoints, saves and loads."""
    latest, condition = run.latest, condition_of(run, now, limits)
    result: dict[str, Any] = {
        "folder": run.folder,
        "state": condition.state,
        "notes": [*condition.alarms, *condition.notes],
        "problem": latest.problem,
        "looked_at": latest.time,
    }
    if latest.history is None:
        return result
    history, figures = latest.history, latest.figures
    result |= {
        "resume": history.resume,
        "age_s": condition.age_s,
        "interval_s": figures.interval_s,
        "save_bytes_per_s": figures.save_rate,
        "blocked_share": figures.blocked_share,
        "loss": figures.losses[-1][1] if figures.losses else None,
        **_counts(figures),
        "fast_tier": None
        if figures.tier is None
        else {**asdict(figures.tier), "behind": figures.behind},
        "report": None if figures.last is None else asdict(figures.last),
    }
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
    """Return folder -> problem for each run that has no recent good checkpoint.

    `max_age_s`: age in seconds up to which a checkpoint is recent; None for any age.
    """
    return {run.folder: why for run in runs if (why := _unhealthy(run, now, max_age_s))}


def _unhealthy(run: WatchedFolder, now: datetime, max_age_s: float | None) -> str | None:
    latest = run.latest
    newest = latest.figures.newest
    if latest.history is None:
        return latest.problem
    if newest is None:
        return "no step to resume from"
    age = age_s_of(latest.figures, now)
    if max_age_s is None or latest.figures.is_finished or (age is not None and age <= max_age_s):
        return None
    if age is None:
        return f"step {newest.step} does not say when it was saved"
    return f"step {newest.step} is {age:.0f} s old, the limit is {max_age_s:.0f} s"


def exposition(runs: Sequence[WatchedFolder], now: datetime, limits: Limits) -> tuple[bytes, str]:
    """Return the metrics of all runs in the format of Prometheus, and the content type."""
    registry = CollectorRegistry()
    registry.register(_Metrics(runs, now, limits))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Metrics(Collector):
    def __init__(self, runs: Sequence[WatchedFolder], now: datetime, limits: Limits) -> None:
        self._runs, self._now, self._limits = {run.folder: run for run in runs}, now, limits

    def collect(self) -> Iterable[Metric]:
        """Return every metric, with a sample for each run that has it."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for folder, run in self._runs.items():
            for kind, name, help_text, value, labels in self._samples_of(run):
                if name not in families:
                    families[name] = kind(f"holdfast_{name}", help_text, labels=["folder", *labels])
                texts = [
                    text.encode(errors="replace").decode() for text in (folder, *labels.values())
                ]
                families[name].add_metric(texts, value)
        return families.values()

    def _samples_of(self, run: WatchedFolder) -> Sequence[Sample]:
        try:
            samples = _samples(run, self._now, self._limits)
            return [(kind, name, text, float(value), on) for kind, name, text, value, on in samples]
        except Exception:  # noqa: BLE001 - an error of one run must not hide the others
            return [(GaugeMetricFamily, "up", UP, 0.0, {})]


Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]
Sample = tuple[Kind, str, str, float, dict[str, str]]
"""Sample of a metric: kind, name, help text, value and labels."""

UP = "Whether the folder can be read and holds checkpoints."


def _samples(run: WatchedFolder, now: datetime, limits: Limits) -> Iterator[Sample]:
    gauge, latest, figures = GaugeMetricFamily, run.latest, run.latest.figures
    yield gauge, "up", UP, float(latest.history is not None), {}
    read_at = "When the folder was last read."
    yield gauge, "last_look_timestamp_seconds", read_at, latest.time, {}
    condition = condition_of(run, now, limits)
    for state in STATES:
        is_so = float(state == condition.state)
        yield gauge, "run_state", "State of the run: 1 for its own.", is_so, {"state": state}
    if latest.history is None:
        return
    newest, committed, age = figures.newest, figures.saved_at, condition.age_s
    if newest is not None and newest.step is not None:
        yield gauge, "newest_good_step", "Step that a resume takes.", newest.step, {}
        if committed is not None and age is not None:
            when = "When that step was committed."
            yield gauge, "newest_good_timestamp_seconds", when, committed, {}
            yield gauge, "newest_good_age_seconds", "Time since that commit.", age, {}
    for kind, count in _counts(figures).items():
        yield gauge, "checkpoints", "Folders, by state.", count, {"state": kind}
    yield gauge, "checkpoint_bytes", "Bytes of all checkpoints.", figures.nbytes, {}
    if figures.interval_s is not None:
        interval = "Median time between the latest saves."
        yield gauge, "save_interval_seconds", interval, figures.interval_s, {}
    if figures.save_rate is not None:
        rate = "Median rate of the latest saves."
        yield gauge, "save_rate_bytes_per_second", rate, figures.save_rate, {}
    if figures.losses:
        yield gauge, "loss", "Last loss.", figures.losses[-1][1], {}
    if figures.tier is not None:
        yield from _tiers(figures.tier, figures.behind)
    if figures.last is not None:
        yield from _reported(figures, figures.last.step)


def _tiers(tier: TierView, behind: int | None) -> Iterator[Sample]:
    """Yield samples of the metrics on the fast tier. `behind`: see `Figures`."""
    gauge, seen = GaugeMetricFamily, "Hosts whose part of the fast tier this machine sees."
    yield gauge, "local_hosts", seen, len(tier.hosts), {}
    if tier.step is None or behind is None:
        return
    yield gauge, "local_step", "Newest step on the disks of the hosts.", tier.step, {}
    steps = "Steps by which the folder of the run is behind the disks of the hosts."
    yield gauge, "local_steps_not_copied", steps, behind, {}
    copies = "Hosts seen that have each file of the newest local step, at least."
    yield gauge, "local_copies", copies, tier.copies, {}


def _reported(figures: Figures, step: int) -> Iterator[Sample]:
    """Yield samples of the metrics that the run wrote, summed over its starts and resumes.

    `step`: step that the run has reached.
    """
    counter, totals = CounterMetricFamily, figures.totals
    yield GaugeMetricFamily, "step", "Step that the run has reached.", step, {}
    if figures.blocked_share is not None:
        share = "Share of the running time that training waited for saves."
        yield GaugeMetricFamily, "save_blocked_ratio", share, figures.blocked_share, {}
    for name, help_text, value in (
        ("saves", "Saves that became durable.", totals.num_saves),
        ("saved_bytes", "Bytes written by saves.", totals.saved_bytes),
        ("save_seconds", "Time from plan to durable.", totals.save_s),
        ("save_blocked_seconds", "Time that training waited for saves.", totals.blocked_s),
        ("failed_saves", "Saves that failed.", totals.num_failed),
        ("loads", "Resumes.", totals.num_loads),
        ("load_seconds", "Time of resumes.", totals.load_s),
    ):
        yield counter, name, help_text, value, {}
    for name, seconds in totals.stage_s.items():
        help_text = "Time of each stage, of its slowest rank."
        yield counter, "save_stage_seconds", help_text, seconds, {"stage": name}


def _counts(figures: Figures) -> dict[str, int]:
    """Return the number of a run's folders in each state: see `CheckpointState`."""
    return {
        "good": figures.num_good,
        "damaged": len(figures.damaged),
        "unreadable": len(figures.unreadable),
        "attempt": figures.num_unfinished,
    }
