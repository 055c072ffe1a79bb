"""`newest_good_on_all_hosts`: all ranks load the same step, also from folders of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import holdfast
from holdfast.comm import Ranks
from holdfast.errors import DamagedError
from holdfast.hosts.choosing import newest_good_on_all_hosts
from holdfast.testing.ranks import run_ranks

PATTERN = re.compile("step_[0-9]+")


def save(root: Path, *steps: int) -> None:
    for step in steps:
        with holdfast.sealed(root / f"step_{step}") as folder:
            (folder / "weights").write_bytes(bytes([step]) * 100)


def damage(root: Path, *steps: int) -> None:
    for step in steps:
        (root / f"step_{step}/weights").write_bytes(b"")


def choose(*roots: Path, ranks_per_host: int = 1) -> list[Path | None]:
    """What each rank loads, on hosts that have these folders."""

    def work(ranks: Ranks) -> Path | None:
        host, local_rank = divmod(ranks.rank, ranks_per_host)
        return newest_good_on_all_hosts(roots[host], PATTERN, ranks=ranks, decides=local_rank == 0)

    return run_ranks(len(roots) * ranks_per_host, work)


def test_the_newest_that_is_good_on_every_host(tmp_path: Path) -> None:
    """G4. Two hosts with folders of their own, two ranks each. Step 3 is damaged on one host, step
    4 was saved on one alone."""
    one, two = tmp_path / "one", tmp_path / "two"
    save(one, 1, 2, 3, 4)
    save(two, 1, 2, 3)
    damage(one, 3)
    found = choose(one, two, ranks_per_host=2)
    assert found == [one / "step_2", one / "step_2", two / "step_2", two / "step_2"]


def test_ranks_that_share_a_folder_load_what_rank_0_chooses(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path, 2)
    assert choose(tmp_path, ranks_per_host=3) == [tmp_path / "step_1"] * 3


def test_no_checkpoint_on_any_host(tmp_path: Path) -> None:
    """A folder that is missing, and one in which all are damaged."""
    save(tmp_path / "two", 1)
    damage(tmp_path / "two", 1)
    assert choose(tmp_path / "one", tmp_path / "two") == [None, None]


def test_hosts_without_a_checkpoint_in_common(tmp_path: Path) -> None:
    """An error on all ranks, rather than a start from the beginning on one."""
    one, two = tmp_path / "one", tmp_path / "two"
    save(one, 1, 3)
    save(two, 2)
    for _ in range(2):
        with pytest.raises(DamagedError, match="good on every host"):
            choose(one, two)
        damage(two, 2)


def test_a_save_in_progress_is_no_candidate(tmp_path: Path) -> None:
    """Method: the folder of a save that has written its seal, and has no name yet."""
    save(tmp_path, 1, 2)
    (tmp_path / "step_2").rename(tmp_path / ".attempt-step_2-0123abcd")
    found: list[Path | None] = run_ranks(
        1,
        lambda ranks: newest_good_on_all_hosts(
            tmp_path, re.compile(".*"), ranks=ranks, decides=True
        ),
    )
    assert found == [tmp_path / "step_1"]
    assert holdfast.newest_good(tmp_path, "*") == tmp_path / "step_1"
