"""Settings of all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadlines: how fast an example runs is up to the machine, and no test is about time.
settings.register_profile("holdfast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("holdfast")
