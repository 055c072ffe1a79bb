"""A planner reuses the encoded index while the layout stays the same, and knows which tensors only
optimizers change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import holdfast
from holdfast.comm import Ranks, Solo
from holdfast.format.manifest import Span
from holdfast.saving.planner import LocalState, Planner
from holdfast.state.objects import StateTree
from holdfast.testing.ranks import run_ranks


def held(planner: Planner, *shapes: tuple[int, ...]) -> LocalState:
    state = {"step": 1, **{f"w{n}": torch.zeros(shape) for n, shape in enumerate(shapes)}}
    return planner.hold(StateTree(state).flatten(), None)


def stock_parts(planner: Planner, offset: int) -> list[bytes | bytearray]:
    assert planner.index is not None
    return planner.index.encoded().stock.encode({"step": ("__0_0.distcp", Span(offset, 100))})


def test_both_indices_are_encoded_once_per_layout() -> None:
    """Method: the encoded objects are kept for equal shapes in other memory and for a value at
    another offset; they are new after a change of a shape."""
    planner = Planner(Solo())
    planner.agree(held(planner, (3, 4), (5,)))
    first, parts = planner.index, stock_parts(planner, 1000)
    planner.agree(held(planner, (3, 4), (5,)))
    assert planner.index is first
    again = stock_parts(planner, 2000)
    assert all(one is other for one, other in zip(parts[:-1], again[:-1], strict=True))
    assert again[-1] != parts[-1], "the place of the value"
    planner.agree(held(planner, (3, 4), (6,)))
    assert planner.index is not first
    assert stock_parts(planner, 1000)[0] != parts[0]


def test_tensors_that_only_optimizers_change_follow_the_parameters() -> None:
    """G2. Method: a parameter is frozen and trained again between saves, without any change of the
    layout; a forward normalizes the weight of another layer."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Embedding(3, 3, max_norm=1.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    planner, tree = Planner(Solo()), StateTree({"model": model, "optimizer": optimizer})

    def stepped() -> frozenset[str]:
        planner.agree(planner.hold(tree.flatten(), None))
        return planner.stepped

    trained = {"model.a.weight", "model.a.bias"}
    assert stepped() == trained
    for trains in (False, True):
        model["a"].bias.requires_grad_(trains)
        assert stepped() == trained - (set() if trains else {"model.a.bias"})


def manager_of(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> holdfast.CheckpointManager:
    config = holdfast.CheckpointConfig(enable=True, interval=1, stop_signals=())
    return holdfast.CheckpointManager(
        folder, model=model, optimizers=optimizer, config=config, ranks=ranks
    )


def test_ranks_agree_on_the_tensors_that_only_optimizers_change(tmp_path: Path) -> None:
    """G7, G15. Method: three ranks hold the same model. The optimizer of one lacks a parameter,
    which another one has frozen. Each rank expects the others to compare the same tensors."""

    def work(ranks: Ranks) -> frozenset[str]:
        model = nn.Linear(3, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1)
        model.bias.requires_grad_(ranks.rank != 2)
        names = ["weight"] if ranks.rank == 1 else ["weight", "bias"]
        optimizer = torch.optim.SGD([model.get_parameter(name) for name in names], lr=0.1)
        with manager_of(tmp_path, model, optimizer, ranks) as manager:
            assert manager.save(1)
            return manager._saver._planner.stepped

    assert run_ranks(3, work, timeout_s=20.0) == [{"weight"}] * 3


def test_ranks_save_optimizers_with_state_that_is_not_a_tensor(tmp_path: Path) -> None:
    """G15. Method: LBFGS counts its steps in plain numbers. Two ranks hold the same ones."""

    def work(ranks: Ranks) -> None:
        model = nn.Linear(3, 3)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        optimizer: Any = torch.optim.LBFGS(model.parameters())

        def closure() -> Any:
            loss = model(torch.ones(2, 3)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        with manager_of(tmp_path, model, optimizer, ranks) as manager:
            assert manager.save(1)

    run_ranks(2, work, timeout_s=20.0)
    assert holdfast.open(tmp_path / "step-1").value("optimizer.state.weight.n_iter") > 0
