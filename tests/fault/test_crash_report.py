"""The command behind docs/crash-report.md."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_report_of_crash_points_finds_nothing_wrong_with_ours_and_much_with_stock() -> None:
    """G2. Method: the command itself, with fewer states per cut. It finds that stock DCP loads
    mixes after a save in place, so it would find the same in Holdfast."""
    command = [sys.executable, "-m", "benchmarks.crash_report", "--seeds", "3"]
    ran = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    bad: Counter[str] = Counter()
    for line in ran.stdout.splitlines()[2:]:
        what, by, _, states, old, new, *wrong = (cell.strip() for cell in line.split("|")[1:-1])
        assert int(states) == int(old) + int(new) + sum(map(int, wrong))
        bad[f"{what}, {by}"] += sum(map(int, wrong))
    ours = {name: count for name, count in bad.items() if "Holdfast" in name}
    assert len(ours) == 4
    assert not any(ours.values()), ran.stdout
    assert bad["save in place, torch DCP"] > 10, ran.stdout
