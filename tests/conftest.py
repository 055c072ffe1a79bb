"""Settings of all tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# No deadlines: how fast an example runs is up to the machine, and no test is about time.
# The same examples each time, so that a change fails by what it changes; `--all` tries others.
quiet = [HealthCheck.too_slow]
settings.register_profile("explore", deadline=None, suppress_health_check=quiet)
settings.register_profile("holdfast", settings.get_profile("explore"), derandomize=True)
settings.load_profile("holdfast")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What of the tests goes to one core together: a file, and all that starts many ranks. These
    take turns on every core as it is; two such tests at once take four times as long as one."""
    for item in items:
        alone = item.path.parent.name == "distributed" or item.path.stem == "test_sigkill"
        item.add_marker(pytest.mark.xdist_group("ranks" if alone else item.path.stem))
