"""The benchmark of restarts, with a small state."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.restarts import FAILURES, measure, table


@pytest.mark.parametrize(("replicas", "lost"), [(0, 14), (1, 2)])
def test_a_lost_host_costs_what_the_benchmark_says(
    tmp_path: Path, replicas: int, lost: int
) -> None:
    """Method: killed after step 30, with a local checkpoint of step 28 and a durable one of step
    16."""
    (failure,) = [one for one in FAILURES if one.name == "a host or its disk is lost"]
    steps, seconds = measure(tmp_path, failure, 32_000, replicas)
    assert steps == lost
    assert 0 < seconds < 60
    assert not [*tmp_path.iterdir()]


def test_a_range_of_lost_steps_is_shown() -> None:
    """Method: invented figures."""
    found = {(one.name, replicas): [(2, 0.5), (4, 0.7)] for one in FAILURES for replicas in (0, 1)}
    lines = table(found)
    assert len(lines) == len(FAILURES) + 2
    assert lines[2].endswith("| 2 to 4 | 0.60 | 2 to 4 | 0.60 |")
