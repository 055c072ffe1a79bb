"""The quiet sync at the start of a command, where its user has agreed by a first one by hand."""

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
    """Bring the copies up to date in every folder that was synced before, and is this user's.
    Returns what there is to say: a line for each folder that changed, or could not be.

    Never raises, waits for nobody, and reads one file a folder while nothing is to be done. Does
    nothing in CI, and on ranks other than 0.
    """
    if environment.get("CI") or any(
        environment.get(rank, "0") != "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    ):
        return []
    said: list[str] = []
    try:
        for target in all_targets(environment, Path.cwd()):
            said += _refreshed(Copies(target.root, categories=target.categories))
    except Exception as error:  # noqa: BLE001 - whatever it is, the command goes on
        said.append(f"skills were not brought up to date: {error}")
    return said


def _refreshed(copies: Copies) -> Iterator[str]:
    synced, version = copies.synced(), installed_version()
    if not synced or order_of(synced) >= order_of(version):
        return
    if copies.root.stat().st_uid != os.geteuid():
        return  # As under sudo: files of root do not belong into a user's home.
    try:
        done = sync(shipped(), copies, version)
    except HoldfastError as error:
        yield f"skills in {copies.root} were not brought up to date: {error.what}"
        return
    if done.changes:
        yield f"skills in {copies.root}: {done}"
    yield from (f"skills in {copies.root}: {problem}" for problem in done.problems)
