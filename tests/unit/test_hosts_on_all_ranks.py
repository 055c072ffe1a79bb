"""`holdfast.hosts.sealed` and `holdfast.hosts.newest_good`: every rank of a job calls them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

import holdfast
from holdfast.comm import Ranks
from holdfast.hosts.folders import fetch_newest_on_all_hosts
from holdfast.hosts.sealing import sealed_by_all
from holdfast.storage.cloud import CloudBucket
from holdfast.testing.ranks import run_ranks
from processes import run_processes
from s3_server import new_s3_url


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


HOSTS = ["host1", "host1", "host2"]
"""Host of each rank."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return f"{new_s3_url(monkeypatch)}/run"


def save_on_hosts(ranks: Ranks, url: str, names: Sequence[str]) -> Path:
    """Save a file of each rank under its name in `names`. Return the folder of its host."""
    with sealed_by_all(url, ranks=ranks, publishes=False, link="self") as folder:
        (folder / "self" / names[ranks.rank]).write_bytes(names[ranks.rank].encode() * 99)
    return folder


def test_hosts_put_their_files_into_one_store(url: str, tmp_path: Path) -> None:
    """Three ranks on two hosts. The second checkpoint is damaged: each host gets the first."""
    folders = run_ranks(
        3, lambda ranks: save_on_hosts(ranks, f"{url}/checkpoint-1", "abc"), hosts=HOSTS
    )
    assert folders[0] == folders[1] != folders[2]
    run_ranks(3, lambda ranks: save_on_hosts(ranks, f"{url}/checkpoint-2", "abc"), hosts=HOSTS)
    bucket = CloudBucket(f"{url}/checkpoint-2")
    key = next(one.key for one in bucket.list_all("") if one.key.endswith("/c"))
    bucket.put(key, b"x" * 99)

    def fetch(ranks: Ranks) -> Path | None:
        into = tmp_path / f"copies{max(0, ranks.rank - 1)}"
        pattern = re.compile("checkpoint-.*")
        return fetch_newest_on_all_hosts(url, pattern, into=into, ranks=ranks)

    found = run_ranks(3, fetch, hosts=HOSTS)
    assert [path and path.parents[1] for path in found] == [
        tmp_path / f"copies{host}" for host in (0, 0, 1)
    ]
    assert {path and path.name for path in found} == {"checkpoint-1"}
    for path in found:
        assert path is not None
        assert sorted(file.name for file in path.iterdir()) == ["a", "b", "c", "holdfast.seal"]
        assert holdfast.check(path) == []
    assert not list((tmp_path / "temporary").iterdir())


def test_hosts_may_write_the_same_file_but_not_different_ones(url: str) -> None:
    """G2, G7. Nothing is published, and the checkpoint of before stays."""
    path = f"{url}/checkpoint-1"
    run_ranks(3, partial(save_on_hosts, url=path, names="aba"), hosts=HOSTS)
    assert holdfast.check(f"{url}/checkpoint-1") == []

    def work(ranks: Ranks) -> None:
        with (
            pytest.raises(holdfast.StorageError, match="two hosts have written different files"),
            sealed_by_all(f"{url}/checkpoint-1", ranks=ranks, publishes=False) as folder,
        ):
            (folder / "config").write_text(str(ranks.rank))

    run_ranks(3, work, hosts=HOSTS)
    assert CloudBucket(url).list("").prefixes == ["checkpoint-1"]
    assert holdfast.check(f"{url}/checkpoint-1") == []


def test_every_rank_of_processes_uses_a_url(url: str, tmp_path: Path) -> None:
    """One process without a group; the first start finds nothing."""
    assert holdfast.hosts.newest_good(url, fetch_to=tmp_path / "copies") is None
    with holdfast.hosts.sealed(f"{url}/checkpoint-1") as folder:
        (folder / "state").write_bytes(b"1")
    newest = holdfast.hosts.newest_good(url, fetch_to=tmp_path / "copies")
    assert newest is not None
    assert (newest / "state").read_bytes() == b"1"


def test_a_url_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a URL would become a folder called `s3:`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(holdfast.UsageError, match="fetch_to"):
        holdfast.hosts.newest_good("s3://bucket/run")
    with (
        pytest.raises(holdfast.UsageError, match="cannot write"),
        holdfast.hosts.sealed("https://bucket/run/step-1"),
    ):
        pass
    assert not list(tmp_path.iterdir())
