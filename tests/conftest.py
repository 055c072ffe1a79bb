"""Settings of all tests."""

from __future__ import annotations

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
