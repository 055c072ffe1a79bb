"""Checkpoints load in other layouts, with real processes: FSDP2, tensor parallelism, both, none."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement
from torch.utils import swap_tensors

import holdfast
from extent import every
from holdfast.comm import all_ranks, capture
from holdfast.saving.planner import LocalState, Planner
from holdfast.state.objects import StateTree
from processes import run_processes

WIDTH = 10
"""Width of the model. Not divisible by 4 or 3, so that shards are uneven and some are empty."""


class Block(nn.Module):
    """Two linear layers, one sharded by columns under tensor parallelism, one by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)


def build(dp: int, tp: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model sharded over `dp` times `tp` ranks, and an AdamW without state."""
    torch.manual_seed(seed)
    model = Block()
    if dp * tp > 1:
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        if tp > 1:
            plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], plan)
        if dp > 1:
            fully_shard(model, mesh=mesh["dp"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Gather every tensor of model and optimizer."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        for slot, value in optimizer.state[parameter].items():
            found[f"{name}/{slot}"] = whole(value)
    return found


def train_a_little(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Train two steps with made-up gradients, since torch cannot multiply unevenly sharded
    matrices."""
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().sin()
        optimizer.step()


def save_on(rank: int, size: int, dp: int, tp: int, path: Path) -> dict[str, torch.Tensor]:
    model, optimizer = build(dp, tp, seed=1)
    train_a_little(model, optimizer)
    holdfast.save(path, {"model": model, "optimizer": optimizer, "step": 7})
    return contents(model, optimizer)


def load_on(rank: int, size: int, layouts: list[tuple[int, int, Path]]) -> list[Any]:
    """Load each checkpoint with its layout of these ranks."""
    loaded = []
    for dp, tp, path in layouts:
        model, optimizer = build(dp, tp, seed=2)
        state = {"model": model, "optimizer": optimizer, "step": 0}
        holdfast.load(path, state)
        loaded.append((state["step"], contents(model, optimizer)))
    return loaded


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """Save one checkpoint per layout. Returns each with its contents."""
    folder = tmp_path_factory.mktemp("saved")
    made = {}
    for dp, tp in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (3, 1)):
        path = folder / f"dp{dp}-tp{tp}"
        results = run_processes(dp * tp, save_on, dp, tp, path)
        made[dp, tp] = path, results[0]
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_layout_loads_on_any_other(saved: dict[tuple[int, int], Any], size: int) -> None:
    """G6, G9. Method: model and AdamW state are saved with every layout of 1 to 4 ranks, FSDP x TP
    and uneven shards included, and loaded bit for bit with every layout of `size` ranks.
    By default, half of the pairs."""
    layouts = [(dp, size // dp) for dp in (1, 2, 3, 4) if size % dp == 0 and size // dp != 3]
    wanted = [
        (*layout, source)
        for number, layout in enumerate(layouts)
        for source in every(2, list(saved), start=number)
    ]
    work = [(dp, tp, saved[source][0]) for dp, tp, *rest in wanted for source in rest]
    for rank in run_processes(size, load_on, work):
        for (*_, source), (step, found) in zip(wanted, rank, strict=True):
            assert step == 7
            check(found, saved[source][1])


def stock_load_on(rank: int, size: int, dp: int, tp: int, path: Path) -> Any:
    model, optimizer = build(dp, tp, seed=3)
    train_a_little(model, optimizer)
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state = {"model": get_model_state_dict(model), "step": 0}
    stock_load(state, checkpoint_id=path)
    return state["step"], {name: whole(t) for name, t in model.named_parameters()}


def test_stock_dcp_loads_our_checkpoint_with_another_layout(
    saved: dict[tuple[int, int], Any],
) -> None:
    """G10. Method: `torch.distributed.checkpoint.load` on 2 ranks reads a checkpoint of FSDP x TP
    on 4."""
    path, expected = saved[2, 2]
    for step, found in run_processes(2, stock_load_on, 2, 1, path):
        assert step == 7
        check(found, {name: t for name, t in expected.items() if "/" not in name})


def stock_save_on(rank: int, size: int, path: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model, optimizer = build(size, 1, seed=1)
    train_a_little(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_save(
            {"model": model_state, "optimizer": optimizer_state, "step": 7}, checkpoint_id=path
        )
    return contents(model, optimizer)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_stock_dcp_checkpoint_loads_on_any_number_of_ranks(size: int, tmp_path: Path) -> None:
    """G10. Method: stock checkpoints of 1, 2 and 4 ranks load bit for bit on one rank and on
    two."""
    path = tmp_path / "stock"
    expected = run_processes(size, stock_save_on, path)[0]
    for ranks, layouts in ((1, [(1, 1, path)]), (2, [(2, 1, path), (1, 2, path)])):
        for rank in run_processes(ranks, load_on, layouts):
            for step, found in rank:
                assert step == 7
                check(found, expected)


def misfit_on(rank: int, size: int, path: Path) -> str:
    model, optimizer = build(size, 1, seed=2)
    before = contents(model, optimizer)
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(holdfast.MismatchError) as caught:
        holdfast.load(path, {"model": model, "optimizer": optimizer, "step": 0})
    check(contents(model, optimizer) | {}, before | {"extra": torch.zeros(3)})
    return str(caught.value)


def test_a_missing_parameter_is_the_same_error_on_every_rank(
    saved: dict[tuple[int, int], Any],
) -> None:
    """G6, G7. Method: load a checkpoint that lacks a parameter. All ranks name it, and nothing
    changes."""
    messages = run_processes(2, misfit_on, saved[4, 1][0])
    assert messages[0] == messages[1]
    assert "`model.extra` is not in the checkpoint" in messages[0]


def fail_on_one_rank(rank: int, size: int, path: Path) -> str:
    state: dict[str, Any] = {"model": build(size, 1, seed=1)[0]}
    if rank == 1:
        state["mine"] = torch.zeros(2, 2).to_sparse()
    with pytest.raises(holdfast.HoldfastError) as caught:
        holdfast.save(path, state)
    return str(caught.value)


def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    """G7. Method: rank 1 alone has a tensor that cannot be saved. The save fails on every rank, and
    leaves no attempt."""
    for message in run_processes(3, fail_on_one_rank, tmp_path / "step-1"):
        assert "rank 1" in message
        assert "`mine`" in message
    assert list(tmp_path.iterdir()) == []


def relaid_on(rank: int, size: int) -> int:
    mesh = init_device_mesh("cpu", (size,))
    ranks = all_ranks()

    def laid(*shape: int, placement: Placement | None = None) -> torch.Tensor:
        tensor = torch.ones(shape)
        return tensor if placement is None else distribute_tensor(tensor, mesh, [placement])

    def local_plans(planner: Planner, state: dict[str, Any]) -> Any:
        held = capture(lambda: planner.hold(StateTree(state).flatten(), None))
        return held.local_plans if isinstance(held, LocalState) else held.what

    # In all cases but one, the first rank has elements of the same shape before and after.
    changes = [
        (laid(4, 4), laid(4, 4).bfloat16()),
        (laid(4, 4), laid(2, 8)),
        (laid(4), laid(4).to("meta")),
        (laid(4, 4), laid(4, 4, placement=Replicate())),
        (laid(4, 4, placement=Replicate()), laid(4, 4)),
        (laid(3, 4, placement=Shard(0)), laid(4, 4, placement=Shard(0))),
        (laid(4, 4, placement=Shard(0)), laid(2, 8, placement=Shard(1))),
    ]
    for before, after in changes:
        planner = Planner(ranks)
        was = local_plans(planner, {"a.b": before})
        wanted = local_plans(Planner(ranks), {"a.b": after})
        assert local_plans(planner, {"a.b": after}) == wanted != was
        assert local_plans(planner, {"a": {"b": before}}) != was, "another path"
        if type(before) is type(after):
            planner.hold(StateTree({"a.b": before}).flatten(), None)
            swap_tensors(before, after)  # type: ignore[no-untyped-call]
            assert local_plans(planner, {"a.b": before}) == wanted
    ranks.close()
    return len(changes)


def test_a_reused_planner_notices_every_change_of_layout() -> None:
    """G6. Method: after a change of a tensor's dtype, shape, placement, path or kind, by another
    object or in place, a reused planner makes the local plan that a new one makes. The planner
    keeps no attribute on tensors, since torch swaps in place only tensors without any."""
    assert run_processes(2, relaid_on) == [7, 7]
