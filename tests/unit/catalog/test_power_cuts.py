"""The power goes at every operation of a save and of a removal; what the next start finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.sweep import execute, plan_sweep
from holdfast.engine.checkpoint import Checkpoint
from holdfast.engine.planner import Planner
from holdfast.engine.ranks import Ranks, Solo
from holdfast.engine.save import save_leaves
from holdfast.engine.source import Source
from holdfast.format.names import aside_of, step_name
from holdfast.state.tree import flatten
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import Store
from holdfast.testing.ranks import try_ranks
from holdfast.testing.stores import CuttingStore, PowerCut

State = dict[str, Any]


def state_of(seed: int) -> State:
    """State of every kind, its largest tensor long enough to be handed to the store in parts."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randint(0, 256, (5 << 20,), dtype=torch.uint8, generator=generator),
        "model": {"w": torch.randn(33, 7, generator=generator), "step": torch.tensor(float(seed))},
        "half": torch.randn(9, generator=generator).to(torch.bfloat16),
        "none": torch.empty(0, 4),
        "seen": {"seed": seed, "text": f"seed {seed}"},
    }


STATES = {seed: state_of(seed) for seed in (1, 2)}


def bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        flat = value.contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), flat.numpy().tobytes()
    return value


def which(store: MemoryStore, name: str) -> int:
    """The seed whose state the checkpoint holds, bit for bit; fails on a mix."""
    checkpoint = Checkpoint(Source(store, name, open_manifest(store, name)))
    found: dict[str, Any] = {n: checkpoint.read(n) for n in checkpoint.tensors}
    found |= {n: checkpoint.value(n) for n in checkpoint.manifest.values}
    seed: int = found["seen.seed"]
    expected = {n: bits(leaf.value) for n, leaf in flatten(STATES[seed]).items()}
    assert {n: bits(value) for n, value in found.items()} == expected
    return seed


def save(store: Store, step: int, seed: int, size: int) -> None:
    """Save by `size` ranks, each of which holds the whole state."""

    def work(ranks: Ranks) -> None:
        leaves = flatten(STATES[seed])
        catalog = Catalog(store)
        save_leaves(
            catalog, step_name(step), leaves, ranks=ranks, planner=Planner(ranks), step=step
        )

    if size == 1:
        work(Solo())
        return
    results = [r for r in try_ranks(size, work) if isinstance(r, BaseException)]
    for error in sorted(results, key=lambda e: not isinstance(e, PowerCut)):
        raise error


Outcome = Mapping[int, int]
"""Seeds by step: what a folder of checkpoints holds."""


def steps_of(store: MemoryStore) -> Outcome:
    """After a sweep, which must leave nothing aside. Every step there is must be whole."""
    assert execute(store, plan_sweep(store.list())) == []
    assert not [name for name in store.list() if aside_of(name.rstrip("/"))]
    return {step: which(store, step_name(step)) for step in Catalog(store).steps()}


def cut_everywhere(
    before: Callable[[Store], None], work: Callable[[Store], None], outcomes: list[Outcome]
) -> None:
    """Cut the power at each operation of `work`; what is found must be one of `outcomes`, of which
    the last is that of work that came to its end. Looked at are both what is durable, as after a
    power cut, and all that was done, as after the death of the process."""
    seen: list[Outcome] = []
    cut_at, died = 0, True
    while died:
        store = MemoryStore()
        before(store)
        cutting = CuttingStore(store, cut_at)
        try:
            work(cutting)
            died = False
        except PowerCut:
            cut_at += 1
        for found in (store.after_power_cut(), store):
            outcome = steps_of(found)
            assert outcome in (outcomes if died else outcomes[-1:]), cutting.log
            seen.append(outcome)
    assert cut_at > 3
    assert all(outcome in seen for outcome in outcomes), "a case that the cuts never reached"


@pytest.mark.parametrize("size", [1, 2])
def test_a_first_save_is_there_whole_or_not_at_all(size: int) -> None:
    """G1, G2. Method: every cut of a save into an empty folder."""
    cut_everywhere(lambda _: None, lambda store: save(store, 1, 1, size), [{}, {1: 1}])


@pytest.mark.parametrize("size", [1, 2])
def test_the_next_save_leaves_the_earlier_step_as_it_was(size: int) -> None:
    """G1, G2. Method: every cut of a save beside an earlier step."""
    cut_everywhere(
        lambda store: save(store, 1, 1, 1),
        lambda store: save(store, 2, 2, size),
        [{1: 1}, {1: 1, 2: 2}],
    )


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_saved_again_is_the_old_one_or_the_new_one_and_never_gone(size: int) -> None:
    """G1, G2. Method: every cut of a save onto the name of an earlier one, from all states of a
    tensor's bytes, values and metadata; stock DCP gives rows of both here."""
    cut_everywhere(
        lambda store: save(store, 1, 1, 1), lambda store: save(store, 1, 2, size), [{1: 1}, {1: 2}]
    )


def test_a_step_that_is_removed_is_whole_until_it_is_gone() -> None:
    """G5. Method: every cut of the removal of the older of two; each file that goes is gone for
    good at once, the worst that a file system may do."""

    def before(store: Store) -> None:
        save(store, 1, 1, 1)
        save(store, 2, 2, 1)

    cut_everywhere(
        before, lambda store: Catalog(store).remove(step_name(1)), [{1: 1, 2: 2}, {2: 2}]
    )


def test_a_sweep_that_dies_is_finished_by_the_next_one() -> None:
    """G1, G2. Method: every cut of the sweep itself, with a dead attempt, half a removal and a
    replaced step that has no successor left over."""

    def before(store: Store) -> None:
        for step, seed in ((1, 1), (2, 1), (3, 2)):
            save(store, step, seed, 1)
        store.rename("step-1", ".replaced-step-1-00000001")
        store.rename("step-2", ".replaced-step-3-00000002")
        save(store, 2, 2, 1)
        store.rename("step-2", ".attempt-step-2-00000003")

    def sweep(store: Store) -> None:
        assert execute(store, plan_sweep(store.list())) == []

    cut_everywhere(before, sweep, [{1: 1, 3: 2}])
