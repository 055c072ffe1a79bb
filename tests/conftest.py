"""Settings of pytest and hypothesis for all tests."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

HELPERS = [path.stem for path in Path(__file__).parent.glob("*.py")]

# A failed assertion in a helper then shows the values that it compares, as in a test file.
pytest.register_assert_rewrite(*HELPERS)

import warm  # noqa: E402 - rewritten too

# Threads of torch wait for each other in loops that use a core each. torch reads the variable when
# it is imported, here and in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadlines, since the time of an example depends on the machine.
# `derandomize` runs the same examples each time, so that a failure comes from a change of the code.
# `--all` tries other examples.
quiet = [HealthCheck.too_slow]
settings.register_profile("explore", deadline=None, suppress_health_check=quiet)
settings.register_profile("holdfast", settings.get_profile("explore"), derandomize=True)
settings.load_profile("holdfast")


class Together(LoadFileScheduling):  # type: ignore[misc]
    """Gives all tests of a file to one core, and all tests that start many ranks to the same core.

    Tests with many ranks use every core. Two of them at once take four times as long as one after
    the other.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "ranks" if "/distributed/" in file or "test_sigkill" in file else file


def pytest_sessionstart() -> None:
    # A collection of garbage takes half a second while modules are imported, and finds nothing.
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_xdist_setupnodes() -> None:
    warm.share()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


FAST = ("unit", "tidy", "golden")
"""Folders of `./run_tests.sh --fast`."""

PROCESSES = re.compile(
    r"subprocess|processes|multiprocessing|browser|(?:import|from) runs\b|from memory\b|layouts\b"
    r"|s3_server"
)
"""Words in test files that start other processes, which import torch, or a server of S3. Both take
seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests that start no process")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--fast`, ignore files in other folders than `FAST`, and files that start processes."""
    if not config.getoption("--fast") or collection_path.suffix != ".py":
        return None
    folder = collection_path.relative_to(Path(__file__).parent).parts[0]
    if folder == "tidy":
        return None
    return folder not in FAST or PROCESSES.search(collection_path.read_text()) is not None
