"""Version of this package."""

from __future__ import annotations

from functools import cache

UNKNOWN = "unknown"
"""Version of code that runs from a folder without being installed."""


@cache
def installed_version() -> str:
    """Return the version of the installed package, or `unknown`."""
    # Cached: every save needs the version, and reading the metadata takes longer than sealing a
    # small file. Imported here: this import takes longer than the rest of `import holdfast`.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("holdfast")
    except PackageNotFoundError:
        return UNKNOWN
