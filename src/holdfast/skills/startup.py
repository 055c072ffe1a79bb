"""Sync skills at the start of a command, in folders that the user has synced before."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from holdfast.errors import HoldfastError
from holdfast.release import installed_version
from holdfast.skills.bundle import shipped
from holdfast.skills.copies import Copies
from holdfast.skills.records import order_of
from holdfast.skills.sync import sync
from holdfast.skills.targets import all_targets


def refresh(environment: Mapping[str, str]) -> list[str]:
    """Sync every folder of skills of this user that an older version of Holdfast has synced.

    Return a line for each folder that changed, and for each failure. This function never raises and
    never waits for a lock. It reads only one file of a folder that is up to date. It does nothing
    in CI, and on ranks other than 0.
    """
    ranks = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    if environment.get("CI") or any(environment.get(rank, "0") != "0" for rank in ranks):
        return []
    lines: list[str] = []
    try:
        for copies in all_targets(environment, Path.cwd()):
            lines += _refreshed(copies)
    except Exception as error:  # noqa: BLE001 - the command must go on
        lines.append(f"skills were not brought up to date: {error}")
    return lines


def _refreshed(copies: Copies) -> Iterator[str]:
    synced, version = copies.synced(), installed_version()
    if not synced or order_of(synced) >= order_of(version):
        return
    if copies.root.stat().st_uid != os.geteuid():
        return  # Under sudo: root must not write files into a user's home.
    try:
        result = sync(shipped(), copies, version)
    except HoldfastError as error:
        yield f"skills in {copies.root} were not brought up to date: {error.what}"
        return
    if result.changes:
        yield f"skills in {copies.root}: {result}"
    yield from (f"skills in {copies.root}: {problem}" for problem in result.problems)
