"""`holdfast.hosts.sealed` and `holdfast.hosts.newest_good`: every rank of a job calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

import holdfast
from processes import run_processes


def save_and_choose(rank: int, size: int, root: str) -> tuple[str | None, str | None]:
    """Two saves of both ranks, the second of which is damaged, and one that a rank fails."""
    empty = holdfast.hosts.newest_good(root)
    for step in (1, 2):
        with holdfast.hosts.sealed(f"{root}/checkpoint-{step}") as folder:
            (folder / f"rank_{rank}").write_bytes(bytes([step]) * 100)
    if rank == 0:
        (Path(root) / "checkpoint-2/rank_1").write_bytes(bytes(100))
    dist.barrier()
    kind = ValueError if rank == 1 else holdfast.RankError
    with pytest.raises(kind), holdfast.hosts.sealed(f"{root}/checkpoint-3") as folder:
        (folder / f"rank_{rank}").write_bytes(b"x")
        if rank == 1:
            raise ValueError("mine")
    newest = holdfast.hosts.newest_good(root)
    return empty and empty.name, newest and newest.name


def test_ranks_seal_one_folder_and_choose_the_same(tmp_path: Path) -> None:
    """G4, G7. The root does not exist at first."""
    root = tmp_path / "run"
    assert run_processes(2, save_and_choose, str(root)) == [(None, "checkpoint-1")] * 2
    names = sorted(path.name for path in root.iterdir())
    assert names == ["checkpoint-1", "checkpoint-2"]
    assert holdfast.check(root / "checkpoint-1") == []


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    with holdfast.hosts.sealed(tmp_path / "ba4") as folder:
        (folder / "state").write_bytes(b"4")
    with holdfast.hosts.sealed(tmp_path / "ba4") as folder:
        (folder / "state").write_bytes(b"44")
    assert holdfast.hosts.newest_good(tmp_path, "ba*") == tmp_path / "ba4"
    assert (tmp_path / "ba4/state").read_bytes() == b"44"
    assert holdfast.hosts.newest_good(tmp_path, "checkpoint-*") is None


def test_a_wrong_argument_is_refused(tmp_path: Path) -> None:
    with pytest.raises(holdfast.UsageError), holdfast.hosts.sealed(4):
        pass
    with pytest.raises(holdfast.UsageError, match="pattern"):
        holdfast.hosts.newest_good(tmp_path, 4)


def test_a_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Method: a URL would become a folder called `s3:`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(holdfast.UsageError, match="is a URL"):
        holdfast.hosts.newest_good("s3://bucket/run")
    with (
        pytest.raises(holdfast.UsageError, match="is a URL"),
        holdfast.hosts.sealed("s3://bucket/run/step-1"),
    ):
        pass
    assert not list(tmp_path.iterdir())
