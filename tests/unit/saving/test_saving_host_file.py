"""Saves of ranks that write one file per host: what they write, and what a failure leaves."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.power_cuts import Operation
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from checkpoints import contents, differing, save_leaves, state
from crashes import RecordingStore
from fast_tier import Run, State
from holdfast import CheckpointConfig, CheckpointManager, HoldfastError
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.comm import Ranks, Solo
from holdfast.errors import StorageError, UsageError
from holdfast.format.names import step_name
from holdfast.manager.context import RunContext
from holdfast.manager.saver import Saver
from holdfast.planning import index
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import Store
from holdfast.testing.failing import FailingStore
from holdfast.testing.ranks import run_ranks, try_ranks

HOSTS = ["a", "b", "a", "a"]
"""Host of each rank. Ranks of one host need not be neighbours."""


def own_state(rank: int) -> dict[str, Any]:
    """The state that all ranks share, and some of each rank."""
    made = torch.Generator().manual_seed(rank)
    own = torch.randint(0, 256, (400_001 * (1 + rank),), dtype=torch.uint8, generator=made)
    return {**state(), f"rank_{rank}": {"own": own, "seen": "x" * 1000 * rank}}


def save(store: Store, hosts: Sequence[str] | None = HOSTS, step: int = 1) -> None:
    """Save by four ranks. `hosts` as in `save_leaves`."""

    def work(ranks: Ranks) -> None:
        leaves = StateTree(own_state(ranks.rank)).flatten()
        facts: dict[str, Any] = {"step": step, "kind": "full"}
        save_leaves(Catalog(store), step_name(step), leaves, ranks, hosts=hosts, **facts)

    store.make_folder("")
    run_ranks(len(HOSTS), work)


@pytest.mark.parametrize("listed_max", [index.LISTED_CHUNKS_MAX, 0])
def test_a_host_has_one_file_with_everything(
    tmp_path: Path, listed_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G3, G6, G20. Method: a save with one file per rank and one with one per host hold the same
    bits, and every byte of both is verified; with and without `index.bin`."""
    monkeypatch.setattr(index, "LISTED_CHUNKS_MAX", listed_max)
    for name, hosts in (("rank", None), ("node", HOSTS)):
        save(LocalStore(tmp_path / name), hosts)
        assert verify(VerifyTarget(LocalStore(tmp_path / name), "step-1")).good
    files = [path.name for path in (tmp_path / "node/step-1").glob("*.distcp")]
    assert sorted(files) == ["__0_0.distcp", "__1_0.distcp"]
    found, expected = (contents(tmp_path / name / "step-1") for name in ("node", "rank"))
    assert differing(found, expected) == []


# Stock torch warns that it runs without a process group.
@pytest.mark.filterwarnings("default")
def test_stock_dcp_reads_the_file_of_a_host(tmp_path: Path) -> None:
    """G10, G20. Method: `dcp.load` of all tensors of a checkpoint with one file per host."""
    save(LocalStore(tmp_path))
    expected = {n: t for n, t in contents(tmp_path / "step-1").items() if torch.is_tensor(t)}
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    stock_load(found, checkpoint_id=tmp_path / "step-1", no_dist=True)
    assert differing(found, expected) == []


def test_a_file_is_synced_once_after_all_ranks_have_written() -> None:
    """G1, G20. Method: the operations of a save: each data file is created and synced once, and no
    write to either file follows the first sync of a file."""
    store = RecordingStore()
    save(store)
    operations = [op for op in store.operations if op.path.endswith(".distcp")]
    verbs = [(op.verb, Path(op.path).name) for op in operations]
    for file in ("__0_0.distcp", "__1_0.distcp"):
        assert verbs.count(("create", file)) == verbs.count(("sync_file", file)) == 1
    first_sync = next(n for n, op in enumerate(operations) if op.verb == "sync_file")
    assert not [op for op in operations[first_sync:] if op.verb == "write"]
    assert _writers(operations) == {"__0_0.distcp": {0, 2, 3}, "__1_0.distcp": {1}}


def _writers(operations: Sequence[Operation]) -> dict[str, set[int]]:
    """Ranks whose own tensors are in each file."""
    found: dict[str, set[int]] = {}
    for rank in range(len(HOSTS)):
        data = own_state(rank)[f"rank_{rank}"]["own"].numpy().tobytes()[:5000]
        for operation in operations:
            if data in operation.data:
                found.setdefault(Path(operation.path).name, set()).add(rank)
    return found


@pytest.mark.parametrize("verb", ["create", "join", "write", "end", "read"])
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_the_error_of_one_rank_reaches_all(verb: str, failing: int) -> None:
    """G1, G8, G20. Method: each operation of each rank on a data file fails in turn: all ranks
    raise its error, and neither a checkpoint nor an attempt is left."""
    stores = [MemoryStore()] * len(HOSTS)
    failed = threading.Event()

    def work(ranks: Ranks) -> None:
        def fail(found: str, key: str) -> None:
            if found == verb and key.endswith(".distcp") and ranks.rank == failing:
                failed.set()
                raise StorageError(f"no {verb} here")

        store = FailingStore(stores[ranks.rank], fail)
        leaves = StateTree(own_state(ranks.rank)).flatten()
        save_leaves(Catalog(store), "step-1", leaves, ranks, hosts=HOSTS, step=1, kind="full")

    outcomes = try_ranks(len(HOSTS), work)
    if failed.is_set():
        assert all(isinstance(outcome, HoldfastError) for outcome in outcomes)
        assert {outcome.what for outcome in outcomes} == {  # type: ignore[union-attr]
            f"rank {failing}: no {verb} here"
        }
        assert stores[0].list() == []
    else:
        # Followers create and read no file, leaders join none.
        assert (verb == "join") == (failing < 2)
        assert outcomes == [None] * len(HOSTS)


def test_a_rank_without_data_writes_nothing(tmp_path: Path) -> None:
    """G6, G20. Method: the only tensor is on a rank that does not lead its host; other hosts have
    no file."""

    def work(ranks: Ranks) -> None:
        own = {"own": torch.arange(5.0)} if ranks.rank == 2 else {}
        leaves = StateTree(own).flatten()
        save_leaves(Catalog(LocalStore(tmp_path)), "step-1", leaves, ranks, hosts=HOSTS)

    run_ranks(len(HOSTS), work)
    assert [path.name for path in (tmp_path / "step-1").glob("*.distcp")] == ["__0_0.distcp"]
    assert contents(tmp_path / "step-1")["own"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_positions_of_tensors_stay_while_values_grow() -> None:
    """G2, G20. Method: two saves by one planner; the second has longer values."""
    store = MemoryStore()
    save(store, step=1)
    before = open_manifest(store, "step-1").tensors
    save(store, step=2)
    assert open_manifest(store, "step-2").tensors == before


class Plain:
    """A store whose files have one writer each."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        if name == "join":
            raise AttributeError(name)
        return getattr(self._store, name)


def test_settings_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    """G11, G20. Method: `deduplicate`, and a store whose files have one writer each."""
    with pytest.raises(UsageError, match="links files of a single rank"):
        CheckpointConfig(enable=True, files="node", deduplicate=True)
    with pytest.raises(UsageError, match="cannot have files that several ranks write"):
        refuse_store(tmp_path)


def refuse_store(folder: Path) -> None:
    config = CheckpointConfig(enable=True, files="node")
    Saver(RunContext(Catalog(Plain(LocalStore(folder))), config, Solo()))


@pytest.mark.parametrize("async_mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_run_saves_and_resumes(tmp_path: Path, async_mode: Any) -> None:
    """G6, G20. Method: three steps on four ranks of two hosts, with retention; every step is good,
    and each rank resumes with its own state."""
    config = CheckpointConfig(
        enable=True, interval=1, files="node", keep_latest_k=2, async_mode=async_mode
    )

    def train(ranks: Ranks) -> int:
        state = State(ranks.rank)
        with CheckpointManager(
            tmp_path, model=state.model, states={"own": state}, config=config, ranks=ranks
        ) as manager:
            start = int(manager.load())
            state.check(start)
            for step in range(start + 1, start + 4):
                state.step(step)
                manager.save(step)
        return start

    assert run_ranks(4, train, hosts=HOSTS) == [0] * 4
    assert run_ranks(4, train, hosts=HOSTS) == [3] * 4
    for step in (5, 6):
        files = [path.name for path in (tmp_path / step_name(step)).glob("*.distcp")]
        assert sorted(files) == ["__0_0.distcp", "__1_0.distcp"]
        assert verify(VerifyTarget(LocalStore(tmp_path), step_name(step))).good


def test_hosts_with_a_fast_tier(tmp_path: Path) -> None:
    """G18, G20. Method: hosts keep the file of another host too; the ranks change places, then a
    disk is lost. A run resumes from the newest step, and the copied step has the files of hosts."""
    run = Run(tmp_path, files="node", local_replicas=1)
    run.train(10)
    files = [path.name for path in (tmp_path / "run/step-8").glob("*.distcp")]
    assert sorted(files) == ["__0_0.distcp", "__2_0.distcp", "__3_0.distcp"]
    assert verify(VerifyTarget(LocalStore(tmp_path / "run"), "step-8")).good
    run.hosts = ["node2", "node1", "node0", "node0"]
    assert run.resumes_from() == 10
    shutil.rmtree(tmp_path / "disks/node1")
    run.hosts = ["new" if host == "node1" else host for host in run.hosts]
    assert run.resumes_from() == 10
