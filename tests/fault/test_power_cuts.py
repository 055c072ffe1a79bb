"""Power cuts at every operation of saves, retention and cleanups, and the next start after each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

from checkpoints import save_leaves
from crashes import SEEDS, cut_everywhere
from holdfast import CheckpointConfig
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.source import Source
from holdfast.comm import Ranks, Solo
from holdfast.format.names import hidden_folder_of, step_name
from holdfast.loading.checkpoint import Checkpoint
from holdfast.manager.context import RunContext
from holdfast.manager.resume import newest_resumable
from holdfast.manager.saver import Saver
from holdfast.planning import index
from holdfast.state.objects import StateTree
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import FolderStore
from holdfast.testing.ranks import run_ranks

State = dict[str, Any]


def state_of(seed: int) -> State:
    """Make a state of all types, whose largest tensor is written in several parts."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randint(0, 256, (5 << 20,), dtype=torch.uint8, generator=generator),
        "model": {"w": torch.randn(33, 7, generator=generator), "step": torch.tensor(float(seed))},
        "half": torch.randn(9, generator=generator).to(torch.bfloat16),
        "none": torch.empty(0, 4),
        "seen": {"seed": seed, "text": f"seed {seed}"},
    }


def bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        flat = value.contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), flat.numpy().tobytes()
    return value


STATES = {seed: state_of(seed) for seed in range(1, 6)}
EXPECTED = {
    seed: {n: bits(leaf.value) for n, leaf in StateTree(state).flatten().leaves.items()}
    for seed, state in STATES.items()
}


def which(store: MemoryStore, name: str) -> int:
    """Return the seed whose state the checkpoint has, bit for bit. Fails on a mix."""
    checkpoint = Checkpoint(Source(store, name, open_manifest(store, name)))
    found: dict[str, Any] = {n: checkpoint.read(n) for n in checkpoint.tensors}
    found |= {n: checkpoint.value(n) for n in checkpoint.manifest.values}
    seed: int = found["seen.seed"]
    assert {n: bits(value) for n, value in found.items()} == EXPECTED[seed], "a mix of states"
    return seed


Outcome = Mapping[int, int]
"""Seeds by step: what a folder of checkpoints holds."""


def steps_of(store: MemoryStore) -> Outcome:
    """Return the steps after a cleanup, which must leave no hidden folder. Every step must be
    complete, and a resume must take the newest."""
    assert execute(store, plan_cleanup(store.list())) == []
    assert not [name for name in store.list() if hidden_folder_of(name.rstrip("/"))]
    catalog = Catalog(store)
    steps = {step: which(store, step_name(step)) for step in catalog.steps()}
    newest, refused = newest_resumable(catalog, None)
    assert (newest and newest.step) == max(steps, default=None)
    assert refused == []
    return steps


def save(store: FolderStore, step: int, seed: int, size: int = 1) -> None:
    """Save on `size` ranks, each of which holds the whole state."""

    def work(ranks: Ranks) -> None:
        leaves = StateTree(STATES[seed]).flatten()
        save_leaves(Catalog(store), step_name(step), leaves, ranks, step=step, kind="full")

    on_ranks(size, work)


def on_ranks(size: int, work: Callable[[Ranks], None]) -> None:
    if size == 1:
        work(Solo())
    else:
        run_ranks(size, work)


def check(
    outcomes: list[Outcome],
    work: Callable[[FolderStore], None],
    before: Callable[[FolderStore], None] | None = None,
    seeds: Iterable[int] = SEEDS,
) -> None:
    """Check that every cut of `work` leaves one of the outcomes, that each of them occurs, and that
    the last is that of finished work."""
    found = cut_everywhere(work, steps_of, before=before, seeds=seeds)
    for cut, outcome in found:
        assert outcome in outcomes, cut
    assert all(outcome in [found for _, found in found] for outcome in outcomes)
    assert found[-1][1] == outcomes[-1]
    assert found[-1][0].at > 3


SIZES = pytest.mark.parametrize("size", [1, 2, 4])
ROWS = pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])


@SIZES
def test_a_first_save_is_complete_or_absent(size: int) -> None:
    """G1, G2. Method: every cut of a save into an empty folder."""
    check([{}, {1: 1}], lambda store: save(store, 1, 1, size))


@ROWS
def test_a_first_save_with_rows_is_complete_or_absent(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1, G2. Method: every cut of a save that writes `index.bin`, into an empty folder."""
    monkeypatch.setattr(index, "LISTED_CHUNKS_MAX", 0)
    check([{}, {1: 1}], lambda store: save(store, 1, 1, size))


@ROWS
def test_a_step_with_rows_saved_again_is_the_old_or_the_new_one(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1, G2. Method: every cut of a save that writes `index.bin` and replaces an earlier one."""
    monkeypatch.setattr(index, "LISTED_CHUNKS_MAX", 0)
    check(
        [{1: 1}, {1: 2}],
        lambda store: save(store, 1, 2, size),
        before=lambda store: save(store, 1, 1),
    )


@SIZES
def test_the_next_save_does_not_change_the_earlier_step(size: int) -> None:
    """G1, G2. Method: every cut of a save beside an earlier step."""
    check(
        [{1: 1}, {1: 1, 2: 2}],
        lambda store: save(store, 2, 2, size),
        before=lambda store: save(store, 1, 1),
    )


@SIZES
def test_a_step_saved_again_is_the_old_or_the_new_one(size: int) -> None:
    """G1, G2. Method: every cut of a save that replaces an earlier one."""
    check(
        [{1: 1}, {1: 2}],
        lambda store: save(store, 1, 2, size),
        before=lambda store: save(store, 1, 1),
    )


def train(
    store: FolderStore, steps: Mapping[int, int], *, size: int, async_mode: Any = "disabled"
) -> None:
    """Save steps as a manager does, keeping two. The state changes as soon as a save returns, as in
    training."""
    config = CheckpointConfig(enable=True, keep_latest_k=2, async_mode=async_mode)

    def work(ranks: Ranks) -> None:
        saver = Saver(RunContext(Catalog(store), config, ranks))
        for step, seed in steps.items():
            state = StateTree({**STATES[seed], "large": STATES[seed]["large"].clone()}).flatten()
            assert saver.save(step, "full", lambda state=state: state)  # type: ignore[misc]
            if async_mode == "async":
                state.leaves["large"].value.fill_(0)
        saver.collect()
        saver.retainer.wait()

    on_ranks(size, work)


@SIZES
@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_retention_never_leaves_fewer_good_steps_than_it_keeps(size: int, async_mode: str) -> None:
    """G1, G2, G5. Method: every cut of four saves that keep two, in the foreground and in the
    background. Each step is of one state, and once there are two there are always two."""
    steps = {1: 1, 2: 2, 3: 3, 4: 4}
    rising: list[Outcome] = [{}, {1: 1}, {1: 1, 2: 2}, {1: 1, 2: 2, 3: 3}]
    check(
        [*rising, {2: 2, 3: 3}, {2: 2, 3: 3, 4: 4}, {3: 3, 4: 4}],
        lambda store: train(store, steps, size=size, async_mode=async_mode),
    )


@SIZES
def test_a_step_saved_again_in_the_background_is_the_old_or_the_new_one(size: int) -> None:
    """G1, G2. Method: every cut of a background save that replaces an earlier one."""
    check(
        [{1: 1, 2: 2}, {1: 1, 2: 3}],
        lambda store: train(store, {2: 3}, size=size, async_mode="async"),
        before=lambda store: train(store, {1: 1, 2: 2}, size=1),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@SIZES
def test_sixty_choices_of_what_each_cut_loses(size: int) -> None:
    """G1, G2, G5. Method: a replacing save and retention as above, with sixty choices for each
    cut."""
    check(
        [{1: 1}, {1: 2}],
        lambda store: save(store, 1, 2, size),
        before=lambda store: save(store, 1, 1),
        seeds=range(60),
    )
    check(
        [{1: 1, 2: 2}, {1: 1, 2: 2, 3: 3}, {2: 2, 3: 3}],
        lambda store: train(store, {3: 3}, size=size, async_mode="async"),
        before=lambda store: train(store, {1: 1, 2: 2}, size=1),
        seeds=range(60),
    )


def test_a_step_that_is_deleted_is_complete_or_absent() -> None:
    """G5. Method: every cut of the deletion of the older of two."""

    def before(store: FolderStore) -> None:
        save(store, 1, 1)
        save(store, 2, 2)

    def delete(store: FolderStore) -> None:
        store.remove(Catalog(store).set_aside_for_deletion(step_name(1)))

    check([{1: 1, 2: 2}, {2: 2}], delete, before=before)


def test_a_cleanup_that_dies_is_finished_by_the_next_one() -> None:
    """G1, G2. Method: every cut of a cleanup of an attempt, an unfinished deletion, and a replaced
    step without a successor."""

    def before(store: FolderStore) -> None:
        for step, seed in ((1, 1), (2, 1), (3, 2)):
            save(store, step, seed)
        store.rename("step-1", ".replaced-step-1-00000001")
        store.rename("step-2", ".replaced-step-3-00000002")
        save(store, 2, 2)
        store.rename("step-2", ".attempt-step-2-00000003")

    def sweep(store: FolderStore) -> None:
        assert execute(store, plan_cleanup(store.list())) == []

    check([{1: 1, 3: 2}], sweep, before=before)
