"""Settings of all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadlines: how fast an example runs is up to the machine, and no test is about time.
# The same examples each time, so that a change fails by what it changes; `--all` tries others.
quiet = [HealthCheck.too_slow]
settings.register_profile("explore", deadline=None, suppress_health_check=quiet)
settings.register_profile("holdfast", settings.get_profile("explore"), derandomize=True)
settings.load_profile("holdfast")
