"""`holdfast version`: the installed versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from holdfast.cli.terminal import JsonOptions, parsed, say, say_json

PACKAGES = ("torch", "numpy", "xxhash", "safetensors")


@dataclass(frozen=True, slots=True)
class VersionArguments(JsonOptions):
    """Print the versions of holdfast, Python, torch and other packages that handle checkpoints.

    Example: holdfast version
    """


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast version`: print the installed versions. Return the exit status."""
    options = parsed(VersionArguments, "version", arguments)
    versions = {"holdfast": _installed("holdfast"), "python": platform.python_version()}
    versions |= {package: _installed(package) for package in PACKAGES}
    if options.json:
        say_json(versions)
        return 0
    for package, number in versions.items():
        say(f"{package} {number}")
    return 0


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
