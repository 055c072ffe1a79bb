"""`sealed_by_all`: what several ranks write is published together, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.comm import Ranks
from holdfast.errors import HoldfastError, RankError
from holdfast.hosts.sealing import sealed_by_all
from holdfast.testing.ranks import run_ranks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(ranks: Ranks, path: Path, **options: Any) -> None:
    with sealed_by_all(str(path), ranks=ranks, publishes=ranks.rank == 0, **options) as folder:
        (folder / f"rank_{ranks.rank}").write_text("x")


def test_all_ranks_write_into_one_folder(tmp_path: Path) -> None:
    run_ranks(3, lambda ranks: write(ranks, tmp_path / "a"))
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["holdfast.seal", "rank_0", "rank_1", "rank_2"]
    assert holdfast.check(tmp_path / "a") == []


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_reaches_all(tmp_path: Path, failing: int) -> None:
    """G7. Method: one rank raises in the block; it gets its own error, the other a RankError."""
    run_ranks(2, lambda ranks: write(ranks, tmp_path / "a"))

    def work(ranks: Ranks) -> str:
        try:
            with sealed_by_all(
                str(tmp_path / "a"), ranks=ranks, publishes=ranks.rank == 0
            ) as folder:
                if ranks.rank == failing:
                    raise KeyError("mine")
                (folder / "new").write_text("x")
        except KeyError:
            return "own"
        except RankError as error:
            return error.what
        return "none"

    found = run_ranks(2, work)
    assert found[failing] == "own"
    assert "the save failed with KeyError" in found[1 - failing]
    assert names(tmp_path) == ["a"]
    assert holdfast.check(tmp_path / "a") == []


def test_a_link_to_the_folder_itself_is_gone_in_the_end(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        path = tmp_path / "a"
        with sealed_by_all(
            str(path), ranks=ranks, publishes=ranks.rank == 0, link="inner"
        ) as folder:
            (folder / "inner" / f"rank_{ranks.rank}").write_text("x")

    run_ranks(2, work)
    assert names(tmp_path / "a") == ["holdfast.seal", "rank_0", "rank_1"]


def test_a_rank_that_does_not_see_the_folder_is_an_error_on_all(tmp_path: Path) -> None:
    """Method: nobody publishes, so nobody makes the folder."""

    def work(ranks: Ranks) -> str:
        with (
            pytest.raises(HoldfastError, match="does not see"),
            sealed_by_all(str(tmp_path / "a"), ranks=ranks, publishes=False),
        ):
            pass
        return "refused"

    assert run_ranks(2, work) == ["refused", "refused"]


def test_what_was_added_to_a_sealed_folder_is_kept(tmp_path: Path) -> None:
    """The old folder stays in place until the new one is complete, which has the added file too."""
    run_ranks(1, lambda ranks: write(ranks, tmp_path / "a"))
    (tmp_path / "a/notes").write_text("mine")

    def work(ranks: Ranks) -> None:
        path = str(tmp_path / "a")
        with sealed_by_all(path, ranks=ranks, publishes=True, moves_aside=True) as folder:
            assert (tmp_path / "a/rank_0").exists()
            (folder / "new").write_text("x")

    run_ranks(1, work)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["holdfast.seal", "new", "notes"]
    assert (tmp_path / "a/notes").read_text() == "mine"


def test_another_folder_is_renamed_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/data").write_text("mine")
    with pytest.raises(holdfast.ExistsError):
        run_ranks(1, lambda ranks: write(ranks, tmp_path / "a"))
    assert names(tmp_path / "a") == ["data"]
    run_ranks(1, lambda ranks: write(ranks, tmp_path / "a", moves_aside=True))
    aside = next(path for path in tmp_path.iterdir() if path.name.startswith("unsealed-a-"))
    assert (aside / "data").read_text() == "mine"
    assert holdfast.check(tmp_path / "a") == []
