"""Power cuts at every operation of saves that link files of earlier checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from crashes import cut_everywhere
from deduplicated import flat, loaded
from holdfast import CheckpointConfig
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.comm import Ranks, Solo
from holdfast.format.names import hidden_folder_of, step_name
from holdfast.manager.context import RunContext
from holdfast.manager.resume import newest_resumable
from holdfast.manager.saver import Saver
from holdfast.state.objects import StateTree
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import Store
from holdfast.testing.ranks import run_ranks


def state_of(step: int) -> dict[str, Any]:
    """A state with a large tensor that never changes, one that changes once, and a small one that
    changes with each step."""
    large = torch.arange(100_000, dtype=torch.float32)
    rare = torch.full((70_000,), 1.0 if step < 3 else 2.0)
    adapter = torch.full((33,), float(step))
    return {"model": {"large": large, "rare": rare, "adapter": adapter}, "seen": {"step": step}}


EXPECTED = {step: flat(state_of(step)) for step in range(1, 10)}


def train(
    store: Store, steps: Sequence[int], *, size: int = 1, async_mode: Any = "disabled"
) -> None:
    """Save steps as a manager does that keeps two, and resumes from the newest."""
    config = CheckpointConfig(enable=True, keep_latest_k=2, deduplicate=True, async_mode=async_mode)

    def work(ranks: Ranks) -> None:
        catalog = Catalog(store)
        saver = Saver(RunContext(catalog, config, ranks))
        assert saver.deduplicator is not None
        saver.deduplicator.resumed(
            [(step_name(s), open_manifest(store, step_name(s))) for s in catalog.steps()]
        )
        for step in steps:
            leaves = StateTree(state_of(step)).flatten()
            assert saver.save(step, "full", lambda leaves=leaves: leaves)  # type: ignore[misc]
        saver.collect()
        saver.retainer.wait()

    if size == 1:
        work(Solo())
    else:
        run_ranks(size, work)


def steps_after(store: MemoryStore) -> list[int]:
    """Return the steps after a cleanup. Each must be complete, a resume must take the newest, and a
    run that goes on from there must save two complete steps."""
    assert execute(store, plan_cleanup(store.list())) == []
    assert not [name for name in store.list() if hidden_folder_of(name.rstrip("/"))]
    steps = Catalog(store).steps()
    check_all(store, steps)
    newest, refused = newest_resumable(Catalog(store), None)
    assert (newest and newest.step) == max(steps, default=None)
    assert refused == []
    last = max(steps, default=0)
    train(store, [last + 1, last + 2])
    check_all(store, [last + 1, last + 2])
    return steps


def check_all(store: Store, steps: Sequence[int]) -> None:
    for step in steps:
        assert loaded(store, step) == EXPECTED[step], f"step {step}"


def check(
    outcomes: Sequence[Sequence[int]], *, before: Sequence[int], steps: Sequence[int], **how: Any
) -> None:
    found = cut_everywhere(
        lambda store: train(store, steps, **how),
        steps_after,
        before=lambda store: train(store, before),
        seeds=range(2),
    )
    for cut, outcome in found:
        assert outcome in outcomes, cut
    assert all(outcome in [found for _, found in found] for outcome in outcomes)
    assert found[-1][1] == outcomes[-1]


def test_a_save_that_links_files_is_complete_or_absent() -> None:
    """G1, G2, G19. Method: every cut of a save that links files of the step before the previous
    one, which retention deletes at its end; then the run goes on."""
    check([[1, 2], [1, 2, 3], [2, 3]], before=[1, 2], steps=[3])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_that_links_files_keeps_two_complete_steps(size: int, async_mode: str) -> None:
    """G1, G2, G5, G19. Method: every cut of three saves on several ranks, in the foreground and in
    the background."""
    check(
        [[1, 2], [1, 2, 3], [2, 3], [2, 3, 4], [3, 4], [3, 4, 5], [4, 5]],
        before=[1, 2],
        steps=[3, 4, 5],
        size=size,
        async_mode=async_mode,
    )
