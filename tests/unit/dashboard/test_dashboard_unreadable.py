"""A checkpoint that cannot be read now, in the table of runs."""

from __future__ import annotations

import errno
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fleets import add_run
from holdfast.dashboard.condition import Limits, condition_of
from holdfast.dashboard.figures import figures_of
from holdfast.dashboard.history import HistoryReader
from holdfast.dashboard.watch import WatchedFolder


def test_a_checkpoint_that_cannot_be_read_is_not_counted_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4. Method: opening the manifest of the newest checkpoint fails, then works again: nothing in
    its folder has changed."""
    folder, real = add_run(tmp_path / "run", now=time.time(), age_s=5), os.open
    newest = max(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    reader = HistoryReader(str(folder))
    good = figures_of(reader.read())

    def failing(path: Any, *more: Any, **named: Any) -> int:
        if path == str(newest / "manifest.json"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        run = WatchedFolder(str(folder))
        run.wait_for_first()
        run.stop()
        condition = condition_of(run, datetime.now(UTC), Limits())
        assert condition.state == "unreadable"
        assert condition.notes[0].startswith(f"{newest.name}: cannot read ")
        figures = figures_of(HistoryReader(str(folder)).read())
        assert (len(figures.damaged), [row.name for row in figures.unreadable]) == (
            0,
            [newest.name],
        )
        reader = HistoryReader(str(folder))
        assert figures_of(reader.read()).num_good == good.num_good - 1
    assert figures_of(reader.read()).num_good == good.num_good
