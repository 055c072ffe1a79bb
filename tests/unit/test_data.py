"""Loaders with one position for the whole run resume on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import holdfast
from holdfast.comm import Ranks
from holdfast.data import ElasticLoader, GlobalBatches
from holdfast.testing.ranks import run_ranks

StatefulDataLoader: Any = import_module("torchdata.stateful_dataloader").StatefulDataLoader

SAMPLES, GLOBAL = 31, 12


def samples_of(batch: Any) -> list[int]:
    found = batch["number"] if isinstance(batch, dict) else batch
    numbers: list[int] = found.tolist()
    return numbers


def table() -> Any:
    """Return a data set of Hugging Face, which is map-style."""
    # Imported here, since each process of the tests imports this module.
    import datasets

    return datasets.Dataset.from_dict({"number": [*range(SAMPLES)]}).with_format("torch")


KINDS: dict[str, Callable[[GlobalBatches], Any]] = {
    "torch": lambda batches: DataLoader(torch.arange(SAMPLES), batch_sampler=batches),  # type: ignore[arg-type]
    "torchdata": lambda batches: StatefulDataLoader(torch.arange(SAMPLES), batch_sampler=batches),
    "datasets": lambda batches: StatefulDataLoader(table(), batch_sampler=batches),
}


def run(folder: Path, kind: str, ranks: Ranks, steps: int) -> list[list[int]]:
    """Train for some steps, from the newest checkpoint; return this rank's samples of each step."""
    sampler = GlobalBatches(
        SAMPLES, global_batch_size=GLOBAL, rank=ranks.rank, num_ranks=ranks.size, seed=3
    )
    loader = ElasticLoader(KINDS[kind](sampler))
    taken: list[list[int]] = []
    config = holdfast.CheckpointConfig(enable=True, interval=2)
    with holdfast.CheckpointManager(
        folder, model=nn.Linear(2, 2), dataloader=loader, config=config, ranks=ranks
    ) as manager:
        step = int(manager.load())
        last = step + steps
        while step < last:
            for batch in loader:
                step += 1
                taken.append(samples_of(batch))
                manager.save(step)
                if step == last:
                    break
    return taken


def together(by_rank: Sequence[list[list[int]]]) -> list[list[int]]:
    """Return the samples of all ranks, step by step."""
    return [[n for part in step for n in part] for step in zip(*by_rank, strict=True)]


# torchdata calls a function that torch has deprecated.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_4_then_2_then_3_ranks_take_the_samples_of_a_run_that_never_stopped(
    kind: str, tmp_path: Path
) -> None:
    """G9. Method: 4 ranks for 2 steps, 2 ranks for 4, 3 ranks for 4, across the ends of epochs,
    with loaders of torch and torchdata and a data set of Hugging Face; one rank without a stop.
    Every global batch has the same samples in the same order, and each epoch every sample once."""
    expected = together([run_ranks(1, lambda ranks: run(tmp_path / "one", kind, ranks, 10))[0]])
    found: list[list[int]] = []
    for size, steps in ((4, 2), (2, 4), (3, 4)):

        def work(ranks: Ranks, steps: int = steps) -> list[list[int]]:
            return run(tmp_path / "elastic", kind, ranks, steps)

        found += together(run_ranks(size, work))
    assert found == expected
    flat = [number for step in found for number in step]
    for epoch in range(len(flat) // SAMPLES):
        assert sorted(flat[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == [*range(SAMPLES)]


@given(
    num_samples=st.integers(1, 50),
    per_rank=st.integers(1, 6),
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=6),
    shuffle=st.booleans(),
)
def test_batches_of_any_ranks_follow_one_another(
    num_samples: int, per_rank: int, sizes: list[int], shuffle: bool
) -> None:
    """Method: in each turn another number of ranks takes the rest of an epoch. All samples of all
    turns, in order, are those of one rank that takes one sample at a time."""
    size, position, taken = 12 * per_rank, 0, []
    for num_ranks in sizes:
        parts = []
        for rank in range(num_ranks):
            options = {"rank": rank, "num_ranks": num_ranks, "shuffle": shuffle}
            batches = GlobalBatches(num_samples, global_batch_size=size, **options)  # type: ignore[arg-type]
            batches.position = position
            parts.append([*batches])
            assert len(parts[-1]) == len(batches)
        taken += [n for step in zip(*parts, strict=True) for part in step for n in part]
        position += size * len(parts[0])
    one = GlobalBatches(num_samples, global_batch_size=1, shuffle=shuffle)
    expected: list[int] = []
    while len(expected) < len(taken):
        one.position = len(expected)
        expected += [batch[0] for batch in one]
    assert taken == expected[: len(taken)]


class Numbers(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def test_samples_that_workers_have_read_ahead_are_not_counted() -> None:
    """G9. Method: two workers that prefetch; the state after each batch counts the batches that the
    loop has received. Making an iterator leaves torch's random numbers as they are."""
    batches = GlobalBatches(SAMPLES, global_batch_size=4)
    loader = ElasticLoader(DataLoader(Numbers(), batch_sampler=batches, num_workers=2))
    before = torch.get_rng_state()
    first = next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)
    assert loader.state_dict()["position"] == 4
    again = GlobalBatches(SAMPLES, global_batch_size=4)
    assert first.tolist() == next(iter(again))


def test_a_position_in_other_data_is_refused() -> None:
    """G6. Method: states of another length, seed, order and class; each difference is named."""
    state = ElasticLoader(KINDS["torch"](GlobalBatches(SAMPLES, global_batch_size=4))).state_dict()
    for key, value in (("num_samples", 30), ("seed", 1), ("shuffle", False), ("order", 5)):
        loader = ElasticLoader(KINDS["torch"](GlobalBatches(SAMPLES, global_batch_size=4)))
        with pytest.raises(holdfast.MismatchError, match=f"`{key}` is {value} in the checkpoint"):
            loader.load_state_dict({**state, key: value})
    with pytest.raises(holdfast.MismatchError, match="saved by another loader"):
        loader.load_state_dict({"_num_yielded": 3})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"global_batch_size": 4, "num_ranks": 3}, "multiple of `num_ranks`"),
        ({"global_batch_size": 4, "num_ranks": 2, "rank": 2}, "`rank`"),
        ({"global_batch_size": 2.5}, "global_batch_size"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(holdfast.UsageError, match=named):
        GlobalBatches(SAMPLES, **arguments)


def test_a_loader_with_another_sampler_is_refused() -> None:
    with pytest.raises(holdfast.UsageError, match="GlobalBatches"):
        ElasticLoader(DataLoader(Numbers(), batch_size=2))
