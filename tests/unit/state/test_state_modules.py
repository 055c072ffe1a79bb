"""Modules of every kind: their `state_dict` is saved, and their own `load_state_dict` restores
it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import holdfast
from holdfast.errors import MismatchError, UsageError
from holdfast.state.model import Names
from holdfast.state.same import same
from holdfast.testing import round_trip


class Halves(nn.Linear):
    """Its `state_dict` returns copies in half precision."""

    def state_dict(self, *args: Any, **more: Any) -> Any:
        state = super().state_dict(*args, **more)
        return {name: value.half() for name, value in state.items()}


class Extra(nn.Module):
    """Has a parameter and extra state of any kind."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Packed(nn.Module):
    """Keeps numbers in an attribute, and saves them in an overridden method of `nn.Module`."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = torch.zeros(3, dtype=torch.int32)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed"] = self.packed.clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.packed = state_dict.pop(f"{prefix}packed")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Growing(nn.Module):
    """Has an entry only after its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen: dict[str, Any] = {}
        hooks: Any = self
        hooks._register_state_dict_hook(self._add)
        hooks.register_load_state_dict_pre_hook(self._take)

    @staticmethod
    def _add(module: Any, state: Any, prefix: str, _: Any) -> None:
        if module.seen:
            state[f"{prefix}seen"] = module.seen

    @staticmethod
    def _take(module: Any, state: Any, prefix: str, *_: Any) -> None:
        module.seen = state.pop(f"{prefix}seen", {})


def test_a_module_whose_state_dict_returns_copies_is_restored(tmp_path: Path) -> None:
    """G15. Method: copies in half precision; at the top level, and inside another module."""
    for wrap in (lambda one: one, lambda one: nn.Sequential(nn.Linear(2, 2), one)):
        one, two = wrap(Halves(2, 2)), wrap(Halves(2, 2))
        holdfast.save(tmp_path / "one", {"model": one}, overwrite=True)
        holdfast.load(tmp_path / "one", {"model": two})
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name]), name


@pytest.mark.parametrize(
    "extra",
    [
        None,
        3,
        torch.ones(3),
        {"amax": torch.ones(2), 0: [1, {"x": torch.zeros(1)}]},
        [],
        {},
        "text",
        torch.ones(2, dtype=torch.bfloat16),
        (1, torch.ones(2)),
        b"bytes",
    ],
    ids=lambda extra: type(extra).__name__,
)
def test_extra_state_of_any_kind_is_restored(extra: Any) -> None:
    """G15. Method: a fresh module has none; in every mode, alone and inside another module."""
    for wrap in (lambda one: one, lambda one: nn.ModuleDict({"a": nn.Linear(1, 1), "b": one})):
        round_trip({"model": wrap(Extra(extra))}, fresh={"model": wrap(Extra("fresh"))})


def test_state_from_overridden_methods_of_a_module_is_restored() -> None:
    """G15. Method: an overridden `_save_to_state_dict`; an entry that a fresh module lacks."""
    one: Any = nn.ModuleDict({"packed": Packed(), "growing": Growing(), "plain": nn.Linear(2, 2)})
    one["packed"].packed += 7
    one["growing"].seen = {"count": 3, "rows": [torch.ones(2), {}]}
    fresh: Any = nn.ModuleDict({"packed": Packed(), "growing": Growing(), "plain": nn.Linear(2, 2)})
    round_trip({"model": one}, fresh={"model": fresh})
    assert fresh["growing"].seen["count"] == 3
    assert torch.equal(fresh["packed"].packed, one["packed"].packed)


def test_a_state_dict_hook_that_renames_and_transposes_is_undone_by_its_counterpart() -> None:
    """G15. Method: the hook stores transposed tensors under other names."""

    def turned() -> Any:
        layer: Any = nn.Linear(2, 3)

        def give(_: Any, state: Any, prefix: str, __: Any) -> None:
            state[f"{prefix}kernel"] = state.pop(f"{prefix}weight").t()

        def take(state: Any, prefix: str, *_: Any) -> None:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel").t()

        layer._register_state_dict_hook(give)
        layer._register_load_state_dict_pre_hook(take)
        return layer

    one, two = turned(), turned()
    round_trip({"model": one}, fresh={"model": two})
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_metrics_are_restored_with_lists_that_grew() -> None:
    """G15. Method: torchmetrics; a sum, and a list of tensors that is empty in a fresh object."""
    torchmetrics = pytest.importorskip("torchmetrics")

    def made() -> Any:
        metrics: Any = nn.ModuleDict(
            {"mean": torchmetrics.MeanMetric(), "cat": torchmetrics.CatMetric()}
        )
        for metric in metrics.values():
            metric.persistent(mode=True)
        return metrics

    one, two = made(), made()
    for number in range(3):
        one["mean"].update(float(number))
        one["cat"].update(torch.tensor([1.0, number]))
    round_trip(
        {"model": nn.Linear(1, 1), "metrics": one}, fresh={"model": nn.Linear(1, 1), "metrics": two}
    )
    for name in ("mean", "cat"):
        assert same(dict(one[name].metric_state), dict(two[name].metric_state)), name


def test_a_lazy_module_is_refused_by_name_before_its_first_batch(tmp_path: Path) -> None:
    """G15. Method: saved before and after a batch; a load completes a fresh module."""
    lazy = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(UsageError, match=r"`model\.0\.weight` is not initialized"):
        holdfast.save(tmp_path / "one", {"model": lazy})
    assert not list(tmp_path.iterdir())
    lazy(torch.ones(1, 5))
    holdfast.save(tmp_path / "one", {"model": lazy})
    fresh = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    holdfast.load(tmp_path / "one", {"model": fresh})
    assert torch.equal(fresh(torch.ones(1, 5)), lazy(torch.ones(1, 5)))


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def data_parallel(module: nn.Module) -> nn.Module:
    if torch.cuda.is_available():
        pytest.skip("with a GPU, DataParallel takes no module on the CPU")
    return nn.DataParallel(module)


WRAPPED: dict[str, Any] = {
    "compile": lambda m: compiled(m),
    "data parallel": data_parallel,
    "averaged": AveragedModel,
    "checkpoint wrapper": checkpoint_wrapper,
    "compile of data parallel": lambda m: compiled(data_parallel(m)),
    "averaged of compile": lambda m: AveragedModel(compiled(m)),
    "part of it": lambda m: nn.Sequential(data_parallel(m[0]), checkpoint_wrapper(m[1])),
    "deep": lambda m: AveragedModel(data_parallel(compiled(m))),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_do_not_change_names(wrap: Any, tmp_path: Path) -> None:
    """G10, G15. Method: saved wrapped, loaded unwrapped, and vice versa; the optimizer too."""

    def made() -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))

    bare, names = made(), [*made().state_dict()]
    wrapped = wrap(made())
    optimizer = torch.optim.AdamW(wrapped.parameters())
    wrapped(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    holdfast.save(tmp_path / "wrapped", {"model": wrapped, "optimizer": optimizer})
    found = holdfast.open(tmp_path / "wrapped").names()
    held = [name.removeprefix("model.") for name in found if name.startswith("model.")]
    assert sorted(set(held) - {"n_averaged"}) == sorted(names)
    again = torch.optim.AdamW(bare.parameters())
    state: dict[str, Any] = {"model": bare, "optimizer": again}
    holdfast.load(tmp_path / "wrapped", state, strict="n_averaged" not in held)
    values = {Names(wrapped).of(raw): value for raw, value in wrapped.state_dict().items()}
    for name, value in bare.state_dict().items():
        assert torch.equal(value, values[name]), name
    moments = [again.state[p]["exp_avg"] for p in bare.parameters()]
    expected = [optimizer.state[p]["exp_avg"] for p in wrapped.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(moments, expected, strict=True))
    if "n_averaged" not in held:
        holdfast.save(tmp_path / "bare", {"model": bare})
        other = wrap(made())
        holdfast.load(tmp_path / "bare", {"model": other})
        for name, value in other.state_dict().items():
            assert torch.equal(value, wrapped.state_dict()[name]), name


def test_names_of_old_versions_and_stock_for_wrapped_modules_are_found(
    tmp_path: Path,
) -> None:
    """G10. Method: entries with `module.` in their names, as old versions saved them."""
    averaged = AveragedModel(nn.Linear(2, 2))
    raw = {name: torch.rand(value.shape) for name, value in averaged.state_dict().items()}
    raw["n_averaged"] = torch.tensor(4)
    holdfast.save(tmp_path / "old", {"ema": raw})
    holdfast.load(tmp_path / "old", {"ema": averaged})
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, raw[name]), name


def test_a_single_module_is_saved_and_loaded_as_its_state_dict(tmp_path: Path) -> None:
    """G15. Method: top-level names as in `model.state_dict()`; a nested module; one that does not
    fit."""
    one, two = (cast("Any", nn.Sequential(nn.Linear(2, 2), Extra(n))) for n in (1, 2))
    holdfast.save(tmp_path / "one", one)
    assert sorted(holdfast.open(tmp_path / "one").names()) == sorted(one.state_dict())
    holdfast.load(tmp_path / "one", two)
    assert torch.equal(one[0].weight, two[0].weight)
    assert two[1].extra == 1
    with pytest.raises(MismatchError, match=r"`0\.weight` has shape \[2, 2\]"):
        holdfast.load(tmp_path / "one", nn.Sequential(nn.Linear(3, 3), Extra()))


def test_the_error_for_a_state_of_another_type_says_what_to_pass(tmp_path: Path) -> None:
    """G15. Method: a tensor, a list, an optimizer, None; for save and load."""
    layer = nn.Linear(1, 1)
    states: list[Any] = [torch.ones(1), [layer], torch.optim.SGD(layer.parameters()), None, 3]
    for state in states:
        for call in (holdfast.save, holdfast.load):
            with pytest.raises(UsageError, match=r"`state` must be a dict .* or a module"):
                call(tmp_path / "one", state)
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_modules_own_load_is_shown(tmp_path: Path) -> None:
    """G15. Method: `set_extra_state` raises."""

    class Picky(Extra):
        def set_extra_state(self, state: Any) -> None:
            raise ValueError(f"not {state}")

    holdfast.save(tmp_path / "one", {"model": Extra(5)})
    with pytest.raises(MismatchError, match="ValueError: not 5"):
        holdfast.load(tmp_path / "one", {"model": Picky()})


def test_tied_weights_and_shared_modules_stay_tied() -> None:
    """G15. Method: one parameter under two names, one module in two places."""
    shared = nn.Linear(2, 2)
    one: Any = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2)})
    one["c"].weight = shared.weight
    fresh = copy.deepcopy(one)
    with torch.no_grad():
        fresh["a"].weight.zero_()
    round_trip({"model": one}, fresh={"model": fresh})
    assert fresh["a"].weight is fresh["c"].weight
