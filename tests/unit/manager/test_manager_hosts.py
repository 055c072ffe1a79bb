"""A job on several hosts, as threads that pretend to be on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, hosts_of
from holdfast.saving import memory, seen
from holdfast.saving.save import save_in
from holdfast.storage.local import LocalStore
from holdfast.testing.ranks import run_ranks, try_ranks

HOSTS = ["node0", "node0", "node1", "node2"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for a network file system."""
    monkeypatch.setattr(seen, "SEEN_S", 0.0)


def own_folder(root: Path, ranks: Ranks, *, shared: str = "") -> Path:
    """The disk of the rank's host. `shared`: hosts that have mounted that of `node0`."""
    host: Any = getattr(ranks, "host", None)
    return root / ("node0" if host in shared.split(",") else host)


@pytest.mark.parametrize("settings", [{}, {"load_only": True}])
def test_a_start_names_the_hosts_that_do_not_see_the_folder(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """G11. Method: three hosts; `node1` has mounted the folder of `node0`, `node2` has not. All
    ranks raise, and nothing is left behind."""
    holdfast.save(tmp_path / "node0/step-1", {"weight": torch.ones(3)})

    def start(ranks: Ranks) -> None:
        config = CheckpointConfig(enable=True, **settings)
        folder = own_folder(tmp_path, ranks, shared="node1")
        CheckpointManager(folder, model=nn.Linear(3, 3), config=config, ranks=ranks)

    for error in try_ranks(4, start, hosts=HOSTS):
        assert isinstance(error, holdfast.StorageError)
        assert "node0` is another folder on host node2 than on host node0" in error.what
    assert {path.name for path in (tmp_path / "node0").iterdir()} <= {".lock", "step-1"}


def test_a_start_on_a_folder_that_all_hosts_share_leaves_nothing_behind(tmp_path: Path) -> None:
    """G11. Method: three hosts, and a save."""

    def start(ranks: Ranks) -> None:
        config = CheckpointConfig(enable=True, interval=1)
        with CheckpointManager(
            tmp_path, model=nn.Linear(3, 3), config=config, ranks=ranks
        ) as manager:
            manager.save(1)

    run_ranks(4, start, hosts=HOSTS)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step-1"}


def test_a_single_save_names_the_hosts_that_do_not_see_the_folder(tmp_path: Path) -> None:
    """G11. Method: three hosts with a folder of their own each; no attempt is left."""

    def save(ranks: Ranks) -> None:
        catalog = Catalog(LocalStore(own_folder(tmp_path, ranks)))
        save_in(catalog, "best", {"a": ranks.rank}, ranks=ranks, overwrite=False)

    for error in try_ranks(4, save, hosts=HOSTS):
        assert isinstance(error, holdfast.StorageError)
        assert "on host node1, node2 than on host node0" in error.what
    assert [*(tmp_path / "node0").iterdir()] == []


def test_machines_of_one_name_are_different_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method: two systems, both called `localhost`, with two ranks each."""
    boots = iter("aabb")
    monkeypatch.setattr("holdfast.comm._boot_id", lambda: next(boots))
    found = run_ranks(4, hosts_of, hosts=["localhost"] * 4)
    assert [len({*names}) for names in found] == [2] * 4
    assert {name.partition("#")[0] for name in found[0]} == {"localhost"}


def test_the_snapshots_of_all_ranks_on_a_host_must_fit_into_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G13. Method: memory for one and a half snapshots: enough for each rank of three hosts, not
    for both ranks of `node0`."""
    nbytes = 1 << 20
    monkeypatch.setattr(memory, "free_memory", lambda: nbytes * 3 // 2)
    state = {"big": torch.zeros(nbytes // 4)}

    def save(ranks: Ranks) -> None:
        config = CheckpointConfig(enable=True, interval=1, async_mode="async")
        states: Any = {f"rank_{ranks.rank}": {name: t.clone() for name, t in state.items()}}
        with CheckpointManager(
            tmp_path, model=nn.Linear(3, 3), states=states, config=config, ranks=ranks
        ) as manager:
            manager.save(1)

    run_ranks(3, save, hosts=HOSTS[1:])
    for error in try_ranks(4, save, hosts=HOSTS):
        assert isinstance(error, holdfast.UsageError)
        assert "for the snapshots of the 2 ranks on this host, 1.6 MB" in error.what
