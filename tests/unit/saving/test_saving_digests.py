"""Replicas that differ between ranks are noticed, named, and never mixed."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import holdfast
from holdfast.catalog.catalog import Catalog
from holdfast.errors import MismatchError, RankError, UsageError
from holdfast.planning.write_plan import LocalPlan, LocalTensor, SharedPlan, groups_of
from holdfast.saving.digests import (
    Digests,
    Replicas,
    digests_of,
    groups_that_differ,
    names_that_differ,
    shared_names,
)
from holdfast.saving.save import save_in
from holdfast.state.shard import Mesh, MeshPlacement, ShardSpec
from holdfast.storage.memory import MemoryStore
from holdfast.testing.ranks import run_ranks

BASE = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def model() -> Any:
    """A model with buffers, equal on all ranks."""
    return copy.deepcopy(BASE)


def config(**more: Any) -> holdfast.CheckpointConfig:
    return holdfast.CheckpointConfig(
        enable=True, interval=1, last_save_model_only=False, stop_signals=(), **more
    )


MODES = ["disabled", "async", "async_with_pinned_mem"]


@pytest.mark.parametrize("mode", MODES)
def test_buffers_that_differ_are_named_and_the_first_ranks_are_saved(
    mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G15. Method: statistics of a BatchNorm, and an average per rank that is so large that several
    ranks would each write a part of it; the saved tensor is never a mixture."""

    def work(ranks: Any) -> None:
        net = model()
        average = nn.Linear(700, 700)
        with torch.no_grad():
            net[1].running_mean.fill_(ranks.rank + 1.0)
            average.weight.fill_(ranks.rank + 1.0)
            average.bias.fill_(ranks.rank + 1.0)
        with holdfast.CheckpointManager(
            tmp_path,
            model=net,
            optimizers=torch.optim.AdamW(net.parameters()),
            states={"average": average},
            config=config(async_mode=mode),
            ranks=ranks,
        ) as manager:
            manager.save(1)
            manager.save(2)

    with caplog.at_level(logging.WARNING, logger="holdfast"):
        run_ranks(3, work)
    for step in (1, 2):
        found = holdfast.open(tmp_path / f"step-{step}")
        for name in ("1.running_mean", "average.weight", "average.bias"):
            assert {*found.read(name).flatten().tolist()} == {1.0}, name
    said = [
        record.message for record in caplog.records if "differs between ranks" in record.message
    ]
    assert len(said) == 3, "each is named once"
    assert any("`1.running_mean` differs between ranks 0 and 1" in line for line in said)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["parameter", "moment"])
def test_trained_tensors_that_differ_are_never_published(
    what: str, mode: Any, tmp_path: Path
) -> None:
    """G15, G7. Method: one rank has diverged; every rank names the tensor and the ranks. Nothing is
    left of the save, and the checkpoint before is intact."""

    def work(ranks: Any) -> None:
        net = model()
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        manager = holdfast.CheckpointManager(
            tmp_path, model=net, optimizers=optimizer, config=config(async_mode=mode), ranks=ranks
        )
        manager.save(1)
        manager.wait()
        if ranks.rank == 2:
            weight: Any = net[0].weight
            with torch.no_grad():
                changed = weight if what == "parameter" else optimizer.state[weight]["exp_avg"]
                changed[1, 1] += 1e-6
        with pytest.raises(MismatchError) as refused:
            manager.save(2)
            manager.wait()
        name = "0.weight" if what == "parameter" else "optimizer.state.0.weight.exp_avg"
        assert f"`{name}` differs between ranks 0 and 2" in refused.value.what
        assert "diverged" in str(refused.value.hint)
        manager.close()

    run_ranks(3, work)
    names = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert names == {"step-1"}


def test_a_save_without_a_manager_notices_tensors_that_differ(tmp_path: Path) -> None:
    """G15. Method: a plain tensor in a dict; equal tensors are still divided between ranks."""

    def work(ranks: Any) -> Any:
        state = {"mine": torch.full((5,), float(ranks.rank)), "ours": torch.ones(900, 900)}
        save_in(Catalog(store), "one", state, ranks=ranks, overwrite=False)

    store = MemoryStore()
    run_ranks(2, work)
    files = [name for name in store.list("one") if name.endswith(".distcp")]
    assert len(files) == 2, "what is alike is written by both"


@given(
    st.integers(0, 40_000),
    st.sampled_from([torch.float32, torch.uint8, torch.bfloat16, torch.int64, torch.bool]),
    st.integers(0, 2**31),
)
def test_a_digest_changes_with_any_element(count: int, dtype: Any, seed: int) -> None:
    """Method: two elements swap places. The sums of accelerators are tested on the CPU."""
    from holdfast.saving.digests import _sums

    generator = torch.Generator().manual_seed(seed)
    one = torch.randint(0, 2 if dtype is torch.bool else 100, (count,), generator=generator)
    one = one.to(dtype)
    other = one.clone()
    assert digests_of({"a": one}) == digests_of({"a": other})
    assert torch.equal(_sums(one), _sums(other))
    if count < 2:
        return
    at, to = np.random.default_rng(seed).choice(count, 2, replace=False).tolist()
    other[at], other[to] = one[to], one[at]
    alike = torch.equal(one, other)
    assert (digests_of({"a": one}) == digests_of({"a": other})) is alike
    assert torch.equal(_sums(one), _sums(other)) is alike


def test_strided_and_conjugated_tensors_have_the_digest_of_their_elements() -> None:
    """Method: transposed, sliced, conjugated, and without elements."""
    base = torch.arange(12.0).reshape(3, 4)
    pairs = [
        (base.t(), base.t().clone()),
        (base[:, 1:3], base[:, 1:3].clone()),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (base[:0], torch.ones(0, 4)),
    ]
    for one, other in pairs:
        assert digests_of({"a": one}) == digests_of({"a": other})


def test_groups_are_the_ranks_that_hold_the_same_elements() -> None:
    """Method: a tensor whole on some ranks; a mesh with a replicated axis."""
    mesh = Mesh((2, 2), (0, 1, 2, 3))
    hsdp = MeshPlacement(mesh, (None, ShardSpec(0)))
    local_plan = LocalPlan({"w": LocalTensor("float32", (4, 4), ("w",), hsdp)})
    part = LocalPlan(
        {"x": LocalTensor("float32", (4,), ("x",)), "e": LocalTensor("int8", (0,), ("e",))}
    )
    all_plans = {"w": [SharedPlan([0, 1, 2, 3], local_plan)], "x": [SharedPlan([1, 3], part)]}
    assert groups_of(all_plans, {"w": local_plan, "x": part}, 1) == {"w": (1, 3), "x": (1, 3)}
    assert groups_of(all_plans, {"w": local_plan}, 2) == {"w": (0, 2)}


def test_groups_are_compared_first_and_then_the_names_of_those_that_differ() -> None:
    """Method: three ranks, two groups; one tensor of one group differs."""

    groups = {"a": (0, 1, 2), "b": (0, 1), "c": (0, 1)}

    def of(values: dict[str, float]) -> Digests:
        tensors = {name: torch.full((3,), value) for name, value in values.items()}
        replicas = Replicas(tensors, shared_names([[name] for name in values], groups))
        replicas.take()
        return replicas.digests

    ranks = [of({"a": 1, "b": 2, "c": 3}), of({"c": 4, "b": 2, "a": 1}), of({"a": 1})]
    differ = groups_that_differ([one.by_group() for one in ranks])
    assert len(differ) == 1
    assert names_that_differ([one.of(differ) for one in ranks]) == {"c": (0, 1)}


class Holder:
    """Object whose state is a given object, or the result of a given function."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def state_dict(self) -> Any:
        return self.held() if callable(self.held) else self.held

    def load_state_dict(self, state: Any) -> None:
        self.held = state


@pytest.mark.parametrize("mode", MODES)
def test_values_that_begin_to_differ_are_named_once(
    mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G15. Method: a value and a learning rate are equal at the first save and differ at later
    ones; another differs later still. The first rank's are saved."""

    def work(ranks: Any) -> None:
        net, held = model(), Holder({"n": 0, "later": 0, "alike": 0})
        optimizer = torch.optim.SGD(net.parameters(), 0.5)
        with holdfast.CheckpointManager(
            tmp_path,
            model=net,
            optimizers=optimizer,
            states={"held": held},
            config=config(async_mode=mode),
            ranks=ranks,
        ) as manager:
            manager.save(1)
            held.held = {"n": 10 + ranks.rank, "later": 0, "alike": 5}
            optimizer.param_groups[0]["lr"] = 1.0 + ranks.rank
            manager.save(2)
            held.held["later"] = ranks.rank
            manager.save(3)
            manager.save(4)

    with caplog.at_level(logging.WARNING, logger="holdfast"):
        run_ranks(3, work)
    said = [one.message for one in caplog.records if "differs between ranks" in one.message]
    names = sorted(line.split("`")[1] for line in said)
    rates = [f"optimizer.param_groups.{name}.lr" for name in ("0.bias", "0.weight")]
    rates += [f"optimizer.param_groups.{name}.lr" for name in ("1.bias", "1.weight")]
    assert names == ["held.later", "held.n", *rates]
    found = holdfast.open(tmp_path / "step-4")
    assert [found.value(name) for name in ("held.n", rates[0])] == [10, 1.0]


def no_value() -> None: ...


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_value_that_one_rank_cannot_save_is_an_error_on_all(
    mode: Any, late: bool, bad: int, tmp_path: Path
) -> None:
    """G15, G7. Method: a function among the values of one rank, at the first save or a later one;
    every rank gets the error with the name, and can save once the value is replaced."""

    def work(ranks: Any) -> None:
        held = Holder({"a": 1})
        with holdfast.CheckpointManager(
            tmp_path,
            model=model(),
            states={"held": held},
            config=config(async_mode=mode),
            ranks=ranks,
        ) as manager:
            if late:
                manager.save(1)
            held.held = {"a": no_value if ranks.rank == bad else 1}
            with pytest.raises(UsageError, match=rf"rank {bad}: `held\.a` is a function"):
                manager.save(2)
            held.held = {"a": 1}
            manager.save(3)

    run_ranks(2, work, timeout_s=10.0)
    assert (tmp_path / "step-3").exists()


@pytest.mark.parametrize("interrupted", [0, 1])
@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_of_one_rank_ends_the_save_on_all(
    what: Any, interrupted: int, tmp_path: Path
) -> None:
    """G15, G7. Method: `state_dict()` of one rank is interrupted; that rank raises the interrupt,
    and no other rank waits for it."""

    def stop() -> None:
        raise what

    def work(ranks: Any) -> None:
        held = Holder(stop if ranks.rank == interrupted else {"a": 1})
        manager = holdfast.CheckpointManager(
            tmp_path, model=model(), states={"held": held}, config=config(), ranks=ranks
        )
        try:
            with pytest.raises(what if ranks.rank == interrupted else RankError) as raised:
                manager.save(1)
        finally:
            manager.close()
        if ranks.rank != interrupted:
            assert f"rank {interrupted}: interrupted by {what.__name__}" in str(raised.value)

    run_ranks(2, work, timeout_s=10.0)
