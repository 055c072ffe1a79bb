"""Loads of optimizers: their own hooks, other parameter groups, other classes."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import holdfast
from holdfast.errors import MismatchError
from holdfast.state.same import same


class Upgrading(torch.optim.AdamW):
    """An optimizer that converts old state in `__setstate__`, as torch's own do."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for slots in self.state.values():
            slots.setdefault("ema", torch.ones(2))
            slots.pop("exp_avg_sq", None)


def hooked(optimizer: Optimizer) -> None:
    def before(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        slots = {n: {**one, "count": 5} for n, one in state["state"].items()}
        return {**state, "state": slots}

    def after(one: Optimizer) -> None:
        for slots in one.state.values():
            slots["ema"] = torch.ones(2)
            slots["exp_avg"] = slots["exp_avg"].to(torch.bfloat16)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


@pytest.mark.parametrize("kind", ["hooks", "__setstate__"])
def test_changes_by_load_hooks_of_an_optimizer_are_kept(kind: str, tmp_path: Path) -> None:
    """G15. Method: hooks before and after a load and `__setstate__` add, remove and cast slots,
    as in torch's own load; no attribute of ours stays on the optimizer."""
    model = nn.Linear(2, 2)
    saved = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    saved.step()
    holdfast.save(tmp_path / "one", {"m": model, "o": saved})

    def made() -> Optimizer:
        if kind == "__setstate__":
            return Upgrading(model.parameters())
        one = torch.optim.AdamW(model.parameters())
        hooked(one)
        return one

    expected, found = made(), made()
    expected.load_state_dict(copy.deepcopy(saved.state_dict()))
    before = {*vars(found)}, len(vars(found)["_optimizer_load_state_dict_pre_hooks"])
    holdfast.load(tmp_path / "one", {"m": model, "o": found})
    assert same(found.state_dict(), expected.state_dict())
    assert "ema" in found.state[model.weight]
    assert before == ({*vars(found)}, len(vars(found)["_optimizer_load_state_dict_pre_hooks"]))


def stepped(make: Any, **options: Any) -> tuple[Any, Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = make(model.parameters(), **options)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


REFUSED = {
    "AdamW": ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "Rprop"],
    "SGD": ["AdamW", "RMSprop", "Adagrad"],
    "RMSprop": ["Adam", "SGD"],
    "Adamax": ["Adam"],
}


@pytest.mark.parametrize(("one", "other"), [(a, b) for a, held in REFUSED.items() for b in held])
def test_an_optimizer_of_another_class_is_refused_if_it_could_not_continue(
    one: str, other: str, tmp_path: Path
) -> None:
    """G15. Method: torch's own, with slots of other names or options of another kind; the message
    names both classes, nothing changes."""
    saved = stepped(getattr(torch.optim, one), **({"momentum": 0.9} if one == "SGD" else {}))
    holdfast.save(tmp_path / "one", dict(zip("mo", saved, strict=True)))
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    optimizer = getattr(torch.optim, other)(model.parameters(), lr=9.0)
    with pytest.raises(MismatchError, match=rf"`o` is the state of torch.*{one}, not of .*{other}"):
        holdfast.load(tmp_path / "one", {"m": model, "o": optimizer})
    assert same(before, model.state_dict())
    assert not {*optimizer.state.get(model.weight, {})} & {"exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[0]["lr"] == 9.0


class Fused(torch.optim.AdamW):
    """A copy of torch's class."""


class Newer(torch.optim.AdamW):
    """A newer version of the class, with one more option."""

    def __init__(self, parameters: Any, **more: Any) -> None:
        super().__init__(parameters, **more)
        self.defaults["cautious"] = False
        for group in self.param_groups:
            group["cautious"] = False


def test_an_optimizer_of_another_class_that_can_continue_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G15. Method: a subclass, Adam after AdamW, RAdam after Adam: a warning names both, from
    `holdfast.load` and from a manager; no warning for the same class, even with an option that a
    scheduler added, and one more default."""
    model, optimizer = stepped(torch.optim.AdamW)
    optimizer.param_groups[0]["initial_lr"] = 0.5
    holdfast.save(tmp_path / "one", {"m": model, "o": optimizer})
    kinds: list[Any] = [Fused, torch.optim.Adam, torch.optim.RAdam, torch.optim.AdamW]
    for make in kinds:
        caplog.clear()
        holdfast.load(tmp_path / "one", {"m": model, "o": make(model.parameters())})
        said = "`o` was saved by torch.optim.adamw.AdamW, and is loaded by" in caplog.text
        assert said == (make is not torch.optim.AdamW)
    config = holdfast.CheckpointConfig(enable=True, interval=1, stop_signals=())
    kinds = [Newer, Fused]
    for number, make in enumerate(kinds):
        caplog.clear()
        with holdfast.CheckpointManager(
            tmp_path / "run", model=model, optimizers=make(model.parameters()), config=config
        ) as manager:
            assert manager.load() == number
            manager.save(number + 1)
        assert ("was saved by" in caplog.text) == (number == 1)


def test_a_state_of_unknown_class_is_refused_only_if_it_cannot_fit(
    tmp_path: Path,
) -> None:
    """G15. Method: an optimizer's state dict, as stock DCP stores it, tells only slots and options.
    A slot from a hook or an option of an older version is no reason to refuse it."""
    model, optimizer = stepped(torch.optim.AdamW)
    optimizer.state[model.weight]["ema"] = torch.ones(1)
    optimizer.param_groups[0]["old"] = 1
    state = dict(optimizer.state_dict())
    holdfast.save(tmp_path / "one", {"m": model, "o": state})
    holdfast.load(tmp_path / "one", {"m": model, "o": Newer(model.parameters())})
    holdfast.load(tmp_path / "one", {"m": model, "o": torch.optim.Adam(model.parameters())})
    with pytest.raises(MismatchError, match=r"an optimizer of another class, not of .*RMSprop"):
        holdfast.load(tmp_path / "one", {"m": model, "o": torch.optim.RMSprop(model.parameters())})


def test_a_group_that_was_saved_empty_is_noted_and_parameters_keep_their_options(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G15. Method: a run moves the parameters of one group into another; its checkpoint loads into
    the original groups, into one group, and into its own, which needs no note."""
    caplog.set_level(logging.WARNING)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def made() -> Optimizer:
        groups: list[Any] = [{"params": model[0].parameters()}]
        return torch.optim.AdamW([*groups, {"params": model[1].parameters(), "lr": 0.3}])

    def moved(one: Optimizer) -> Optimizer:
        first, second = one.param_groups
        second["params"] += first["params"]
        first["params"] = []
        return one

    optimizer = moved(made())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 7.0
    holdfast.save(tmp_path / "one", {"m": model, "o": optimizer})
    same_groups = moved(made())
    holdfast.load(tmp_path / "one", {"m": model, "o": same_groups})
    assert same(same_groups.state_dict(), optimizer.state_dict())
    assert not caplog.text
    for fresh in (made(), torch.optim.AdamW(model.parameters())):
        caplog.clear()
        holdfast.load(tmp_path / "one", {"m": model, "o": fresh})
        assert {group["lr"] for group in fresh.param_groups} == {0.3}
        assert "`o`: group 0 had no parameters when it was saved" in caplog.text
        for parameter in model.parameters():
            assert same(dict(fresh.state[parameter]), dict(optimizer.state[parameter]))


class WideMomentum(Optimizer):
    """An optimizer that keeps float32 moments and a counter beside parameters of any dtype."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def advance(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                zero = torch.zeros_like(parameter, dtype=torch.float32)
                slots = self.state[parameter] or {"m": zero, "count": torch.tensor(2**40)}
                moment = slots["m"] * 0.9 + parameter.grad.float() / 3
                self.state[parameter] = {"m": moment, "count": slots["count"] + 1}


@pytest.mark.parametrize("keys", [("model", "critic"), ("gen", "critic"), ("critic", "model")])
def test_slots_keep_their_dtype_beside_another_model_of_other_dtype(
    keys: tuple[str, str], tmp_path: Path
) -> None:
    """G15. Method: two models have parameters of the same names; the optimizer of the one in
    bfloat16 has slots of other dtypes. Whether slots are cast depends on its own parameters."""

    def made() -> tuple[dict[str, Any], WideMomentum]:
        first, second = nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()
        optimizer = WideMomentum(second.parameters())
        return {keys[0]: first, keys[1]: second, "o": optimizer}, optimizer

    state, optimizer = made()
    for parameter in state[keys[1]].parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.advance()
    holdfast.save(tmp_path / "one", state)
    fresh, resumed = made()
    holdfast.load(tmp_path / "one", fresh)
    assert same(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("key", ["model", "net"])
def test_slots_follow_a_change_of_dtype_under_any_key(key: str, tmp_path: Path) -> None:
    """G15. Method: a model is saved in bfloat16 and loaded in float32, as in torch's own load; the
    optimizer makes a step after it."""
    model = nn.Linear(2, 2).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    holdfast.save(tmp_path / "one", {key: model, "o": optimizer})
    fresh = nn.Linear(2, 2)
    resumed = torch.optim.AdamW(fresh.parameters())
    holdfast.load(tmp_path / "one", {key: fresh, "o": resumed})
    assert resumed.state[fresh.weight]["exp_avg"].dtype is torch.float32
    fresh(torch.ones(1, 2)).sum().backward()
    resumed.step()


def test_names_of_parameters_in_groups_stay_those_of_this_run(tmp_path: Path) -> None:
    """G15. Method: an optimizer that was given named parameters, loaded with them in another order,
    split into two groups, and merged again."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    named = [*model.named_parameters()]
    halves = [{"params": named[:2]}, {"params": named[2:]}]

    def load_into(parameters: Any, name: str) -> Optimizer:
        optimizer = torch.optim.AdamW(parameters)
        holdfast.load(tmp_path / name, {"m": model, "o": optimizer})
        names = {id(parameter): name for name, parameter in named}
        for group in optimizer.param_groups:
            assert group["param_names"] == [names[id(p)] for p in group["params"]]
        return optimizer

    holdfast.save(tmp_path / "whole", {"m": model, "o": torch.optim.AdamW(named)})
    load_into(named[::-1], "whole")
    split = load_into(halves, "whole")
    holdfast.save(tmp_path / "split", {"m": model, "o": split})
    load_into(named, "split")
    unnamed = torch.optim.AdamW(model.parameters())
    holdfast.load(tmp_path / "split", {"m": model, "o": unnamed})
    assert "param_names" not in unnamed.param_groups[0]
