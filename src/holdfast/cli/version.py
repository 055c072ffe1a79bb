"""`holdfast version`: what is installed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from holdfast.cli.terminal import parsed, say, say_json


@dataclass(frozen=True, slots=True)
class VersionArguments:
    """What is installed: holdfast, Python, torch and what else reads and writes checkpoints.

    Example: holdfast version
    """

    json: bool = False
    """Print JSON."""

    debug: bool = False
    """On an error, print where it came from."""


def run(arguments: Sequence[str]) -> int:
    """Print versions; the exit status."""
    asked = parsed(VersionArguments, "version", arguments)
    found = {"python": platform.python_version()}
    for package in ("holdfast", "torch", "numpy", "xxhash", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found = {"holdfast": found.pop("holdfast"), **found}
    if asked.json:
        say_json(found)
        return 0
    for package, number in found.items():
        say(f"{package} {number}")
    return 0
