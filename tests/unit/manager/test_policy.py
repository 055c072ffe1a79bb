"""Which steps are saved, and which checkpoints may be deleted."""

from __future__ import annotations

from math import isnan, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.policy import (
    Candidate,
    Progress,
    Retention,
    best_interval,
    is_due,
    reasons_to_keep,
    removable,
)


def test_saves_are_due_at_the_interval_at_the_last_step_and_optionally_the_first() -> None:
    config, now = CheckpointConfig(enable=True, interval=10), Progress()
    due = [s for s in range(1, 26) if is_due(s, last_step=s == 25, config=config, progress=now)]
    assert due == [10, 20, 25]
    first = CheckpointConfig(enable=True, interval=10, enable_first_step_checkpoint=True)
    assert is_due(1, last_step=False, config=first, progress=now)


def test_a_save_is_also_due_after_interval_minutes() -> None:
    config = CheckpointConfig(enable=True, interval=1000, interval_minutes=5)
    for seconds, due in ((299.0, False), (300.0, True)):
        progress = Progress(steps=3, seconds=seconds)
        assert is_due(3, last_step=False, config=config, progress=progress) is due


def test_the_automatic_interval_is_youngs_optimum_within_its_bounds() -> None:
    """Method: a save of 2 s, a failure a day, steps of half a second: sqrt(2 * 2 * 86400) s, which
    is 588 s or 1176 steps; then bounds, and a run without measurements."""
    config = CheckpointConfig(enable=True, interval="auto", max_interval=10_000)
    progress = Progress(steps=1175, step_s=0.5, save_s=2.0)
    assert best_interval(config, progress) == 1176
    assert not is_due(7, last_step=False, config=config, progress=progress)
    later = Progress(steps=1176, step_s=0.5, save_s=2.0)
    assert is_due(7, last_step=False, config=config, progress=later)
    narrow = CheckpointConfig(enable=True, interval="auto", min_interval=20, max_interval=100)
    assert best_interval(narrow, progress) == 100
    assert best_interval(narrow, Progress(step_s=90.0, save_s=0.001)) == 20
    assert best_interval(narrow, Progress()) == 20, "so that a first save is measured soon"


@pytest.mark.parametrize(
    "settings",
    [
        {"interval": 0},
        {"min_interval": 0},
        {"min_interval": 9, "max_interval": 8},
        {"mtbf_hours": 0.0},
        {"interval_minutes": -1.0},
        {"write_bandwidth_limit": -1.0},
    ],
)
def test_invalid_intervals_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=[*settings][-1]):
        CheckpointConfig(enable=True, **settings)


def test_no_save_is_due_if_saving_is_off() -> None:
    for config in (CheckpointConfig(interval=1), CheckpointConfig(enable=True, load_only=True)):
        assert not is_due(1, last_step=True, config=config, progress=Progress())


candidates = st.lists(
    st.builds(
        Candidate,
        step=st.integers(0, 50),
        resumable=st.booleans(),
        metrics=st.dictionaries(st.sampled_from(["loss", "score"]), st.floats()),
        pinned=st.booleans(),
    ),
    unique_by=lambda candidate: candidate.step,
)
rules = st.builds(
    Retention,
    latest_k=st.integers(2, 6),
    every_n_steps=st.integers(0, 20),
    best_k=st.integers(0, 4),
    best_metric=st.sampled_from(["loss", "score"]),
    best_mode=st.sampled_from(["min", "max"]),
)


@given(candidates, rules, st.integers(0, 50), st.sets(st.integers(0, 50)))
def test_retention_keeps_exactly_what_its_rules_keep_up_to_the_current_step(
    good: list[Candidate], retention: Retention, current: int, protected: set[int]
) -> None:
    """G5. Method: each rule is written here a second time. Steps up to the current one stay if any
    rule keeps them, and only then; later ones are never deleted."""
    ours = sorted(c.step for c in good if c.step <= current)
    resumable = sorted(c.step for c in good if c.step <= current and c.resumable)
    stay = {*ours[-retention.latest_k :], *resumable[-2:], *protected}
    stay |= {c.step for c in good if c.pinned}
    every = retention.every_n_steps
    stay |= {step for step in ours if every and step % every == 0}
    measured = [
        (c.metrics[retention.best_metric], c.step)
        for c in good
        if c.step <= current and not isnan(c.metrics.get(retention.best_metric, nan))
    ]
    for _ in range(min(retention.best_k, len(measured))):
        values = [value for value, _ in measured]
        best = min(values) if retention.best_mode == "min" else max(values)
        found = max(entry for entry in measured if entry[0] == best)
        measured.remove(found)
        stay.add(found[1])
    going = removable(good, retention, current=current, protected=protected)
    assert going == [step for step in ours if step not in stay]


def test_keep_latest_k_0_keeps_all() -> None:
    assert removable([Candidate(step) for step in range(100)], Retention(0)) == []


def test_each_kept_checkpoint_has_reasons() -> None:
    """G5: the reasons that `prune` prints."""
    good = [
        Candidate(10, metrics={"loss": 1.0}),
        Candidate(20, metrics={"loss": nan}),
        Candidate(30, resumable=False),
        Candidate(40, resumable=False, pinned=True),
        Candidate(50, resumable=False),
        Candidate(100),
    ]
    retention = Retention(latest_k=2, every_n_steps=50, best_k=1)
    assert reasons_to_keep(good, retention) == {
        10: ["best 1 by loss"],
        20: ["to resume from"],
        30: [],
        40: ["pinned"],
        50: ["latest 2", "every 50 steps"],
        100: ["latest 2", "every 50 steps", "to resume from"],
    }


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("keep_latest_k", 1, "keep_latest_k"),
        ("keep_latest_k", -1, "keep_latest_k"),
        ("keep_every_n_steps", -1, "keep_every_n_steps"),
        ("keep_best_k", -1, "keep_best_k"),
        ("interval", 0, "interval"),
        ("load_step", -2, "load_step"),
        ("exclude_from_loading", ("model",), "without which nothing is resumed"),
    ],
)
def test_invalid_settings_are_refused(key: str, value: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CheckpointConfig(**{key: value})  # type: ignore[arg-type]
