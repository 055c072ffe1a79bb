"""Which steps are saved, and which may go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.policy import is_due, kind_of_save, removable

steps = st.lists(st.integers(0, 50), unique=True)


def test_steps_at_the_interval_the_first_if_asked_and_the_last_are_due() -> None:
    config = CheckpointConfig(enable=True, interval=10)
    due = [s for s in range(1, 26) if is_due(s, last_step=s == 25, config=config)]
    assert due == [10, 20, 25]
    first = CheckpointConfig(enable=True, interval=10, enable_first_step_checkpoint=True)
    assert is_due(1, last_step=False, config=first)


def test_nothing_is_due_when_saving_is_off() -> None:
    for config in (CheckpointConfig(interval=1), CheckpointConfig(enable=True, load_only=True)):
        assert not is_due(1, last_step=True, config=config)


def test_only_the_last_step_is_model_only() -> None:
    config = CheckpointConfig(enable=True)
    assert kind_of_save(last_step=True, config=config) == "model"
    assert kind_of_save(last_step=False, config=config) == "full"


@given(
    good=steps,
    current=st.integers(0, 50),
    keep=st.integers(2, 6),
    protected=st.sets(st.integers(0, 50)),
)
def test_retention_keeps_its_floor_and_never_looks_past_the_current_step(
    good: list[int], current: int, keep: int, protected: set[int]
) -> None:
    """G5: of the steps up to the current one the latest `keep` stay, with every protected one; no
    later step goes, and what goes is good."""
    going = removable(good, current=current, keep_latest_k=keep, protected=protected)
    assert set(going) <= set(good) - protected
    assert all(step <= current for step in going)
    stay = sorted(step for step in good if step not in going and step <= current)
    assert len(stay) >= min(keep, len([s for s in good if s <= current]))
    if going:
        assert max(going) < min(stay[-keep:])


def test_zero_keeps_all() -> None:
    assert removable(range(100), current=100, keep_latest_k=0) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("keep_latest_k", 1, "keep_latest_k"),
        ("keep_latest_k", -1, "keep_latest_k"),
        ("interval", 0, "interval"),
        ("load_step", -2, "load_step"),
        ("exclude_from_loading", ("model",), "without which nothing is resumed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(key: str, value: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CheckpointConfig(**{key: value})  # type: ignore[arg-type]
