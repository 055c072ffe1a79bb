"""Power cuts at every operation of saves whose ranks write one file per host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from crashes import SEEDS, cut_everywhere
from deduplicated import flat, loaded
from holdfast import CheckpointConfig
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.comm import Ranks
from holdfast.format.names import hidden_folder_of, step_name
from holdfast.manager.context import RunContext
from holdfast.manager.resume import newest_resumable
from holdfast.manager.saver import Saver
from holdfast.state.objects import StateTree
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import Store
from holdfast.testing.ranks import run_ranks

HOSTS = ["a", "a", "b"]


def state_of(step: int) -> dict[str, Any]:
    """A state of all ranks, and a tensor and a value of each."""
    shared = torch.full((70_000,), float(step))
    own = {f"rank_{rank}": torch.full((999,), step + rank / 10) for rank in range(len(HOSTS))}
    return {"model": {"shared": shared, **own}, "seen": {"step": step, "text": "x" * 100 * step}}


EXPECTED = {step: flat(state_of(step)) for step in range(1, 5)}


def train(store: Store, steps: Sequence[int], *, async_mode: Any = "disabled") -> None:
    """Save steps as a manager does that keeps two."""
    config = CheckpointConfig(enable=True, keep_latest_k=2, files="node", async_mode=async_mode)

    def work(ranks: Ranks) -> None:
        saver = Saver(RunContext(Catalog(store), config, ranks))
        for step in steps:
            state = state_of(step)
            for rank in {*range(len(HOSTS))} - {ranks.rank}:
                del state["model"][f"rank_{rank}"]
            leaves = StateTree(state).flatten()
            assert saver.save(step, "full", lambda leaves=leaves: leaves)  # type: ignore[misc]
        saver.collect()
        saver.retainer.wait()

    run_ranks(len(HOSTS), work, hosts=HOSTS)


def steps_after(store: MemoryStore) -> list[int]:
    """Return the steps after a cleanup. Each is complete, and a resume takes the newest."""
    assert execute(store, plan_cleanup(store.list())) == []
    assert not [name for name in store.list() if hidden_folder_of(name.rstrip("/"))]
    steps = Catalog(store).steps()
    for step in steps:
        assert sorted(n for n in store.list(step_name(step)) if n.endswith(".distcp")) == [
            "__0_0.distcp",
            "__2_0.distcp",
        ]
        assert loaded(store, step) == EXPECTED[step], f"step {step}"
    newest, refused = newest_resumable(Catalog(store), None)
    assert (newest and newest.step) == max(steps, default=None)
    assert refused == []
    return steps


def check(
    outcomes: Sequence[Sequence[int]], *, before: Sequence[int], steps: Sequence[int], **how: Any
) -> None:
    found = cut_everywhere(
        lambda store: train(store, steps, **how),
        steps_after,
        before=lambda store: train(store, before),
        seeds=SEEDS,
    )
    for cut, outcome in found:
        assert outcome in outcomes, cut
    assert all(outcome in [found for _, found in found] for outcome in outcomes)
    assert found[-1][1] == outcomes[-1]


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_save_into_files_of_hosts_is_complete_or_absent(async_mode: str) -> None:
    """G1, G2, G20. Method: every cut of a third save by three ranks on two hosts, after which
    retention deletes the first one."""
    check([[1, 2], [1, 2, 3], [2, 3]], before=[1, 2], steps=[3], async_mode=async_mode)


def test_a_step_saved_again_into_files_of_hosts() -> None:
    """G1, G2, G20. Method: every cut of a save that replaces the newest step with equal contents,
    and of the one after it."""
    check([[1, 2], [1, 2, 3], [2, 3]], before=[1, 2], steps=[2, 3])
