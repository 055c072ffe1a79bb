"""Settings of all tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

# No deadlines: how fast an example runs is up to the machine, and no test is about time.
# The same examples each time, so that a change fails by what it changes; `--all` tries others.
quiet = [HealthCheck.too_slow]
settings.register_profile("explore", deadline=None, suppress_health_check=quiet)
settings.register_profile("holdfast", settings.get_profile("explore"), derandomize=True)
settings.load_profile("holdfast")


class Together(LoadFileScheduling):  # type: ignore[misc]
    """Hands out the tests of a file to one core, and to one all that start many ranks. These take
    turns on every core as it is; two such tests at once take four times as long as one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "ranks" if "/distributed/" in file or "test_sigkill" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


FAST = ("unit", "tidy", "golden")
"""Folders of `./run_tests.sh --fast`."""

PROCESSES = re.compile(r"subprocess|processes|multiprocessing|browser|import runs\b|layouts\b")
"""Words of test files that start other processes, each of which imports torch for seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests that start no process")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--fast`, leave out the files of other folders, and those that start processes."""
    if not config.getoption("--fast") or collection_path.suffix != ".py":
        return None
    folder = collection_path.relative_to(Path(__file__).parent).parts[0]
    if folder == "tidy":
        return None
    return folder not in FAST or PROCESSES.search(collection_path.read_text()) is not None
