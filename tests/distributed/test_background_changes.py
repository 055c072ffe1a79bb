"""Background copies of DTensors: training with FSDP does not count as a change, other code does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.saving.stage import Staging
from processes import run_processes


def paused_copies() -> threading.Event:
    """Make the background copies of this process wait for the returned event."""
    allowed, staging_class = threading.Event(), cast(Any, Staging)
    run = staging_class.run

    def run_when_allowed(staging: Staging) -> None:
        assert allowed.wait(60)
        run(staging)

    staging_class.run = run_when_allowed
    return allowed


def sharded(size: int) -> nn.Sequential:
    """A model of uneven shards, whose layers are gathered one by one."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))
    mesh = init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return model


def whole(parameter: Any) -> torch.Tensor:
    full: torch.Tensor = parameter.detach().full_tensor()
    return full.clone()


CONFIG = CheckpointConfig(
    enable=True,
    interval=1,
    async_mode="async_with_pinned_mem",
    keep_latest_k=0,
    last_save_model_only=False,
)


def train(rank: int, size: int, folder: Path, options: dict[str, Any]) -> list[torch.Tensor]:
    """Train with FSDP. The copy of each save begins right before the next step. Returns the weight
    at each save."""
    copies = paused_copies()
    model = sharded(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    expected = []
    with CheckpointManager(folder, model=model, optimizers=optimizer, config=CONFIG) as manager:
        for step in range(4):
            # The first save comes before the first forward, which completes the set-up of FSDP.
            expected.append(whole(model[2].weight))
            copies.clear()
            assert manager.save(step + 1)
            for _ in range(2):
                model(torch.ones(3, 6)).float().square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            copies.set()
            optimizer.step()
            optimizer.zero_grad()
    return expected


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
def test_training_with_fsdp_does_not_count_as_a_change(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """G2. Method: train on two ranks with mixed precision, accumulated and clipped gradients. All
    checkpoints are saved, with the weights at the call of `save`."""
    expected, _ = run_processes(2, train, tmp_path, options)
    for step, weight in enumerate(expected, 1):
        assert torch.equal(holdfast.open(tmp_path / f"step-{step}").read("2.weight"), weight)


def by_the_dtensor(weight: DTensor, _: torch.optim.Optimizer) -> None:
    weight.mul_(2)


def by_the_local_tensor(weight: DTensor, _: torch.optim.Optimizer) -> None:
    weight.to_local().mul_(2)


def by_the_state(weight: DTensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[weight]["exp_avg"].zero_()


WAYS: dict[Callable[..., None], str] = {
    by_the_dtensor: "`2.weight`: 1 operation in place",
    by_the_local_tensor: "`2.weight`: 1 operation in place",
    by_the_state: "`optimizer.state.2.weight.exp_avg`: 1 operation in place",
}


def change(rank: int, size: int, folder: Path) -> None:
    """In each way, change a shard of rank 1 before it is copied."""
    copies = paused_copies()
    model: Any = sharded(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3, 6)).float().square().mean().backward()
    optimizer.step()
    for number, (way, line) in enumerate(WAYS.items()):
        with CheckpointManager(
            folder / str(number), model=model, optimizers=optimizer, config=CONFIG
        ) as manager:
            copies.clear()
            manager.save(1)
            if rank == 1:
                with torch.no_grad():
                    way(model[2].weight, optimizer)
            copies.set()
            with pytest.raises(holdfast.UsageError) as raised:
                manager.wait()
            assert raised.value.what.startswith("rank 1: tensors changed after `save` was called")
            assert raised.value.what.endswith(line)


def test_a_change_of_a_dtensor_before_it_is_copied_fails_the_save(tmp_path: Path) -> None:
    """G2, G7. Method: rank 1 changes its shard by an operation on the DTensor, on its local tensor
    or on the optimizer's state. Both ranks raise an error that names the tensor."""
    run_processes(2, change, tmp_path)
    assert not [*tmp_path.glob("*/step-*")]
