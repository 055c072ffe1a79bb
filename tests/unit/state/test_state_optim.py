"""Optimizer state by parameter name; modules, schedulers and random number generators as state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import holdfast
from holdfast.errors import UsageError
from holdfast.state.model import ModelState, adapted
from holdfast.state.objects import StateTree
from holdfast.state.optim import OptimizerState
from holdfast.state.rng import RngState
from holdfast.state.stateful import ObjectState, RankState
from holdfast.state.tree import Flattener
from processes import run_processes


class Net(nn.Module):
    """Return two layers, the first one frozen, and a parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        self.unused = nn.Parameter(torch.zeros(5))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.frozen(x))
        return out


def groups(net: Net) -> list[dict[str, Any]]:
    """Put the head's weight in a group with its own rate, all others in a second group."""
    rest = [p for p in net.parameters() if p is not net.head.weight]
    return [{"params": [net.head.weight], "lr": 0.5}, {"params": rest, "lr": 0.25}]


def trained(seed: int, steps: int = 3) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.AdamW(groups(net))
    for _ in range(steps):
        train_step(net, optimizer)
    return net, optimizer


def train_step(net: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def flat(net: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the entries of optimizers by name, with each name of an option."""
    flattener = Flattener(lambda *_: None)
    OptimizerState([net], optimizers).flatten(flattener, ())
    leaves = flattener.state.leaves
    return {n: leaf.value for one, leaf in leaves.items() for n in leaf.names or [one]}


def test_the_names_are_those_of_torchs_flattened_optimizer_state() -> None:
    """G10. Method: compared with torch's `get_optimizer_state_dict` with
    `flatten_optimizer_state_dict`, which TorchTitan writes. Only we name frozen parameters."""
    net, optimizer = trained(0)
    found = flat(net, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    expected = get_optimizer_state_dict(net, optimizer, options=options)
    for name, value in expected.items():
        if name.startswith("state.unused"):
            continue  # torch steps the optimizer once to make this state up
        assert same(found[name], value), name


def test_an_option_is_saved_once_under_the_names_of_all_its_parameters() -> None:
    """Method: numbers, texts and lists of them are one leaf for a group; a tensor, and a list with
    a tensor, one leaf for a parameter; repeated with a new option and without one parameter."""
    net, optimizer = trained(0)
    first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
    first |= {"lr": torch.tensor(0.5), "mine": [torch.ones(2), {"x": 1}], "names": ["a", "b"]}
    tree = StateTree({"net": net, "optimizer": OptimizerState([net], [optimizer])})
    for _ in range(2):
        state = tree.flatten()
        names = {n: leaf.path for one, leaf in state.leaves.items() for n in leaf.names or [one]}
        for group in optimizer.param_groups:
            held = [n for n, p in net.named_parameters() if any(p is q for q in group["params"])]
            for option in group.keys() - {"params"}:
                spelled = [f"optimizer.param_groups.{name}.{option}" for name in held]
                if option == "mine":
                    assert all(f"{one}.0" in names and f"{one}.1.x" in names for one in spelled)
                else:
                    assert all(one in names for one in spelled), option
                if option in ("betas", "names", "eps"):
                    leaf = state.leaves[spelled[0]]
                    assert [*leaf.names] == spelled
        # Between two saves: one option more, one parameter less.
        last["more"] = last["params"].pop(0) is None


@pytest.mark.parametrize(
    "beside",
    [
        {"a.b.param_groups": {"head.weight": {"lr": 3}}},
        {"a.b.param_groups.unused.betas": torch.ones(2)},
        None,
    ],
)
def test_an_option_with_the_name_of_another_entry_is_refused(beside: dict[str, Any] | None) -> None:
    """Method: the name is that of a value, a tensor, or in another optimizer's options."""
    net, optimizer = trained(0)
    beside = beside or {"a.b": torch.optim.SGD(net.parameters())}
    tree = StateTree({"net": net, "a": {"b": optimizer}, **beside})
    with pytest.raises(UsageError, match=r"two entries have the name `a\.b\.param_groups\."):
        tree.flatten()


def test_a_parameter_without_state_has_no_state_and_keeps_its_options() -> None:
    """G9. Method: a frozen parameter, and one that never had a gradient."""
    net, optimizer = trained(0)
    found = flat(net, optimizer)
    assert not [name for name in found if name.startswith(("state.frozen", "state.unused"))]
    assert found["param_groups.frozen.weight.lr"] == 0.25
    assert found["param_groups.head.weight.lr"] == 0.5


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_training_continues_bit_for_bit_after_save_and_load(make: Any, tmp_path: Any) -> None:
    """G9. Method: three steps, saved, loaded into a fresh model and optimizer with other rates and
    another order of groups; two more steps on each are equal in every bit."""
    torch.manual_seed(1)
    net = Net()
    more = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(groups(net), **more)
    for _ in range(3):
        train_step(net, optimizer)
    holdfast.save(tmp_path / "step-3", {"model": net, "optimizer": optimizer})
    other = Net()
    with torch.no_grad():
        [p.fill_(9.0) for p in other.parameters()]
    reordered = make([{**g, "lr": 7.0} for g in reversed(groups(other))], **more)
    holdfast.load(tmp_path / "step-3", {"model": other, "optimizer": reordered})
    for one, opt in ((net, optimizer), (other, reordered)):
        torch.manual_seed(2)
        train_step(one, opt)
        train_step(one, opt)
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_optimizer_without_its_module_numbers_its_parameters(tmp_path: Any) -> None:
    """G9. Method: saved and loaded without the module."""
    net, optimizer = trained(0)
    holdfast.save(tmp_path / "step-1", {"optimizer": optimizer})
    other = Net()
    fresh = torch.optim.AdamW(groups(other))
    holdfast.load(tmp_path / "step-1", {"optimizer": fresh})
    assert same(fresh.state_dict(), optimizer.state_dict())
    assert torch.equal(
        fresh.state[other.head.weight]["exp_avg"], optimizer.state[net.head.weight]["exp_avg"]
    )


def test_two_optimizers_of_one_parameter_are_refused() -> None:
    """G6. Method: the same parameters passed twice."""
    net = Net()
    twice = [torch.optim.SGD(net.parameters(), lr=1.0) for _ in range(2)]
    with pytest.raises(UsageError, match="in two optimizers"):
        OptimizerState([net], twice)


def test_two_optimizers_of_different_parameters_are_one_state() -> None:
    """G9. Method: compared with the union of both states."""
    net, _ = trained(0)
    both = [
        torch.optim.SGD(net.head.parameters(), lr=1.0),
        torch.optim.SGD([net.unused], lr=2.0),
    ]
    found = flat(net, *both)
    assert found["param_groups.head.bias.lr"] == 1.0
    assert found["param_groups.unused.lr"] == 2.0


def names_under_ddp(rank: int, size: int) -> list[list[str]]:
    net = Net()
    wrapped = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(wrapped.parameters())
    kept, whole = adapted([wrapped])
    return [
        [*ModelState([wrapped]).state_dict()],
        [*whole.state_dict()],
        [*kept.state_dict()],
        [name for name in flat(wrapped, optimizer) if name.endswith(".lr")],
    ]


def test_ddp_does_not_change_names() -> None:
    """G9. Method: a wrapped model in a real process group, compared with one that is not wrapped;
    so a checkpoint of many ranks loads on one."""
    ((state, whole, kept, optimized),) = run_processes(1, names_under_ddp)
    assert state == whole == [*Net().state_dict()]
    assert {*optimized} == {f"param_groups.{name}.lr" for name, _ in Net().named_parameters()}
    assert {*state} - {*kept} == {"frozen.weight", "frozen.bias"}


class Counter:
    """A `Stateful` with one number, and possibly other objects."""

    def __init__(self, count: int = 0, inner: dict[str, Any] | None = None) -> None:
        self.count, self.inner = count, inner or {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "inner": self.inner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self.inner = state_dict["count"], state_dict["inner"]


def test_objects_at_any_depth_are_saved_and_loaded(tmp_path: Any) -> None:
    """G6, G9. Method: one at the top level, one in a dict, one in another's state, and values."""
    state = {"a": Counter(1, {"n": [1, 2]}), "deep": {"b": Counter(2)}, "plain": {"x": 3}}
    holdfast.save(tmp_path / "step-1", state)
    a, b = Counter(inner={"n": []}), Counter()
    target: dict[str, Any] = {"a": a, "deep": {"b": b}, "plain": {"x": 0}}
    holdfast.load(tmp_path / "step-1", target)
    assert (a.count, a.inner) == (1, {"n": [1, 2]})
    assert b.count == 2
    assert target["plain"] == {"x": 3}
    assert target["a"] is a


def test_a_flat_entry_has_its_names_at_the_top_level() -> None:
    """G10. Method: a model as in TorchTitan, without `model.` before its names."""
    state = {"model": nn.Linear(2, 2), "step": 7}
    tree = StateTree(state, flat="model", others=["dataloader"])
    assert {*tree.flatten().leaves} == {"weight", "bias", "step"}


def test_unknown_entries_count_as_the_flat_models(tmp_path: Any) -> None:
    """G6. Method: an entry that might be a parameter which the model lacks is an error; an entry of
    another known component is not."""
    saved = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "dataloader": {"x": 1}}
    holdfast.save(tmp_path / "one", saved)
    manifest = holdfast.open(tmp_path / "one").manifest
    tree = StateTree({"model": nn.Linear(2, 2)}, flat="model", others=["dataloader"])
    assert not tree.match(manifest).extra
    tree = StateTree({"model": nn.Linear(2, 2)}, flat="model")
    assert [*tree.match(manifest).extra] == ["dataloader.x"]


def draws() -> tuple[Any, ...]:
    return (
        torch.randn(5).tolist(),
        [random.random() for _ in range(5)],
        random.gauss(0, 1),
        np.random.random(5).tolist(),
        np.random.standard_normal(),
    )


def test_the_generators_continue_bit_for_bit(tmp_path: Any) -> None:
    """G9. Method: torch, Python and numpy, mid-stream, each with a cached Gaussian; after a save,
    other draws and a load, the next draws equal those after the save."""
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    random.gauss(0, 1)
    np.random.standard_normal()
    holdfast.save(
        tmp_path / "step-1", {"rng": RankState(ObjectState(RngState()), 0, may_lack=True)}
    )
    expected = draws()
    assert draws() != expected
    holdfast.load(
        tmp_path / "step-1", {"rng": RankState(ObjectState(RngState()), 0, may_lack=True)}
    )
    assert draws() == expected


def test_a_rank_without_saved_generators_keeps_its_own(tmp_path: Any) -> None:
    """G9. Method: rank 3 loads a checkpoint of rank 0 alone; it draws numbers of its own."""
    holdfast.save(
        tmp_path / "step-1", {"rng": RankState(ObjectState(RngState()), 0, may_lack=True)}
    )
    before = torch.get_rng_state()
    holdfast.load(
        tmp_path / "step-1", {"rng": RankState(ObjectState(RngState()), 3, may_lack=True)}
    )
    assert torch.equal(torch.get_rng_state(), before)
