"""The command that makes benchmarks/results, with every other library that is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmarks_measure_every_figure_and_draw_it(tmp_path: Path) -> None:
    """Method: run the command on a tiny state, from the first save to the page of results. Each
    load in it compares bits with the saved ones."""
    out = tmp_path / "results"
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--gb", "0.02", "--rounds", "1"]
    command += ["--folder", str(tmp_path), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    page = (out / "README.md").read_text()
    missing = [line for line in page.splitlines() if "not measured" in line]
    assert all("torch_checkpointing" in line for line in missing), missing
    plots = re.findall(r"\]\((.*\.svg)\)", page)
    assert len(plots) >= 10
    assert all((out / plot).exists() for plot in plots)
    assert (out / "planning.md").exists()
