"""The version of this package."""

from __future__ import annotations

UNKNOWN = "unknown"
"""Version of code that runs from a folder, without having been installed."""


def installed_version() -> str:
    """Version of the installed package, or `unknown`."""
    # Not at the top: it costs more than all else that `import holdfast` does.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("holdfast")
    except PackageNotFoundError:
        return UNKNOWN
