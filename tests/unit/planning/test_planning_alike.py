"""Containers that differ between ranks make the save fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import MismatchError
from holdfast.state.same import same
from holdfast.testing.ranks import run_ranks


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held

    def state_dict(self) -> Any:
        return self.held

    def load_state_dict(self, state: Any) -> None:
        self.held = state


def save(folder: Path, states: list[dict[str, Any]]) -> None:
    """Save the states of as many ranks as one checkpoint."""

    def work(ranks: Any) -> None:
        from holdfast.catalog.catalog import Catalog
        from holdfast.saving.save import save_in
        from holdfast.storage.local import LocalStore

        catalog = Catalog(LocalStore(folder))
        save_in(catalog, "x", states[ranks.rank], ranks=ranks, overwrite=False)

    run_ranks(len(states), work, timeout_s=10.0)


T = torch.ones

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "empty or not": ({}, {"a": 1}),
    "keys": ({"a": 1}, {"b": 1}),
    "none or empty": (None, {}),
    "kinds": ({"a": {}}, {"a": []}),
    "lists of tensors": ([T(1)], [T(1), T(1)]),
    "shorter list": ([T(1), T(1)], [T(1)]),
    "empty list": ([], [T(2)]),
    "types of keys": ({1: 2}, {"1": 2}),
    "types of keys of tensors": ({1: T(1)}, {"1": T(1)}),
    "inner key": ({"a": {"b": T(2)}}, {"a": {"b": T(2), "c": 5}}),
    "tensor or none": ({"a": T(2)}, {"a": None}),
    "array": ({"a": T(2)}, {"a": np.ones(2, np.float32)}),
    "type of number": ({"a": 1.0}, {"a": np.float32(1)}),
    "list or tuple": ([np.ones(1)], (np.ones(1),)),
    "inside of an object": ({"inner": Holder({"a": 1})}, {"inner": Holder({"a": 1, "b": 2})}),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("wraps", [Holder, lambda one: one])
def test_containers_that_differ_between_ranks_are_refused(
    wraps: Any, case: str, tmp_path: Path
) -> None:
    """G15. Method: pairs of containers that differ in keys, lengths, kinds or types, as plain state
    and in the state of an object, in both orders; nothing is published."""
    for one, other in (DIFFERENT[case], DIFFERENT[case][::-1]):
        with pytest.raises(
            MismatchError, match=r"differs between ranks|do not hold one"
        ) as refused:
            save(tmp_path, [{"o": wraps(one)}, {"o": wraps(one)}, {"o": wraps(other)}])
        assert "`o" in refused.value.what
        assert "rank_3" in str(refused.value.hint)
        assert not (tmp_path / "x").exists()


ALIKE: dict[str, list[dict[str, Any]]] = {
    "keys of ranks": [
        {"o": Holder({"rank_0": {"a": 1}, "n": 2})},
        {"o": {"rank_1": [T(1)], "n": 2}},
    ],
    "names of ranks": [{"rank_0": {"a": 1}}, {"rank_1": [1, T(1)]}],
    "a component each": [{"one": {"a": 1}}, {"two": [T(1)]}],
    "stages": [{"model": {"0.weight": T(1)}}, {"model": {"1.weight": T(1)}}],
    "flat stages": [{"0.weight": T(1)}, {"1.weight": T(1), "1.bias": T(1)}],
    "order": [{"o": {"a": 1, "b": 2}}, {"o": {"b": 2, "a": 1}}],
    "modules": [{"o": {"stage": nn.Linear(1, 1), "n": 1}}, {"o": {"stage": nn.Flatten(), "n": 1}}],
}


@pytest.mark.parametrize("case", ALIKE)
def test_entries_of_single_ranks_are_merged(case: str, tmp_path: Path) -> None:
    """G15. Method: keys of one rank each, components of some ranks, stages of a model."""
    save(tmp_path, ALIKE[case])
    assert holdfast.open(tmp_path / "x").names()


def optimized(*, steps: bool, lone: bool = False) -> tuple[Any, Any]:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        # Ranks are threads here, and share the generator.
        nn.init.ones_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    if steps:
        model(T(1, 2)).sum().backward()
        optimizer.step()
    if lone:
        optimizer.state[model.bias]["own"] = torch.ones(1)
    return model, optimizer


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_slot_of_one_rank_alone_is_refused(mode: Any, tmp_path: Path) -> None:
    """G15. Method: two ranks have the same parameters, but one has one slot more or has not
    stepped; at the first save and at a later one."""

    def work(ranks: Any) -> None:
        model, optimizer = optimized(steps=True)
        config = holdfast.CheckpointConfig(
            enable=True, interval=1, last_save_model_only=False, stop_signals=(), async_mode=mode
        )
        with holdfast.CheckpointManager(
            tmp_path, model=model, optimizers=optimizer, config=config, ranks=ranks
        ) as manager:
            manager.save(1)
            if ranks.rank == 1:
                optimizer.state[model.bias]["own"] = torch.ones(1)
            with pytest.raises(MismatchError, match=r"`optimizer\.state\.bias\.own` is on rank 1"):
                manager.save(2)

    run_ranks(2, work, timeout_s=10.0)
    states = []
    for stepped in (False, True):
        model, optimizer = optimized(steps=stepped)
        states.append({"model": model, "optimizer": optimizer})
    with pytest.raises(MismatchError, match="whose optimizer has the parameter too"):
        save(tmp_path / "other", states)


def test_pipeline_stages_may_have_different_slots(tmp_path: Path) -> None:
    """G15. Method: optimizers of two stages with different parameters and slots."""
    states = []
    for rank in range(2):
        model, optimizer = optimized(steps=True, lone=rank == 1)
        whole = nn.ModuleDict({f"stage{rank}": model})
        states.append({"model": whole, "optimizer": optimizer})
    save(tmp_path, states)
    found = holdfast.open(tmp_path / "x")
    assert "optimizer.state.stage1.bias.own" in found.tensors
    assert same(found.read("optimizer.state.stage1.bias.own"), torch.ones(1))
