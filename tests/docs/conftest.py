"""Checkpoints of the reference training run, which several pages begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import furnish, run_line


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the 100 steps of `./run_train.sh`. Returns the outputs of the run."""
    folder = tmp_path_factory.mktemp("trained")
    furnish(folder, steps=100)
    run_line(folder, "./run_train.sh")
    return folder / "outputs"
