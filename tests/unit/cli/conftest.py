"""Folders of checkpoints that tests of commands change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def steps(saved: Path, tmp_path: Path) -> Path:
    """Copy of `saved`, the folder of checkpoints that a module makes."""
    return Path(shutil.copytree(saved, tmp_path / "steps"))
