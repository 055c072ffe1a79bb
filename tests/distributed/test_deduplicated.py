"""A sharded run that deduplicates, and resumes in another layout, with real processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from deduplicated import files_of
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.format.names import step_name
from holdfast.storage.local import LocalStore
from processes import run_processes

WIDTH = 130
"""Width of the model. Not divisible by 4, so that shards are uneven."""

Contents = dict[str, torch.Tensor]


class Adapted(nn.Module):
    """A frozen layer, sharded by columns under tensor parallelism, and a small trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, 3 * WIDTH).requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, 3)


def build(dp: int, tp: int, seed: int) -> Adapted:
    torch.manual_seed(seed)
    model = Adapted()
    if dp * tp > 1:
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        if tp > 1:
            parallelize_module(model, mesh["tp"], {"base": ColwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    return model


def contents(model: nn.Module) -> Contents:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def train_on(
    rank: int, size: int, dp: int, tp: int, folder: Path, num_steps: int
) -> list[Contents]:
    """Resume, and train. Returns the contents of the model after the resume, and in each save."""
    model = build(dp, tp, seed=1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    config = CheckpointConfig(enable=True, interval=1, deduplicate=True, async_mode="async")
    saved = []
    with CheckpointManager(folder, model=model, optimizers=optimizer, config=config) as manager:
        start = int(manager.load())
        saved.append(contents(model))
        for step in range(start + 1, start + 1 + num_steps):
            for parameter in trained:
                parameter.grad = parameter.detach().sin()
            optimizer.step()
            manager.save(step)
            saved.append(contents(model))
    return saved


def test_a_sharded_run_links_files_and_resumes_in_another_layout(tmp_path: Path) -> None:
    """G6, G19. Method: four ranks of two by two save five steps, two ranks of another layout resume
    and save five more, then one rank resumes. Each run links files from its third save on, every
    step is good, and each resume finds what was saved."""
    first = run_processes(4, train_on, 2, 2, tmp_path, 5)[0]
    second = run_processes(2, train_on, 2, 1, tmp_path, 5)[0]
    (last,) = run_processes(1, train_on, 1, 1, tmp_path, 0)[0]
    for found, expected in ((second[0], first[-1]), (last, second[-1])):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    inodes = {step: {*files_of(tmp_path, step).values()} for step in range(1, 11)}
    for step in (3, 4, 5, 8, 9, 10):
        assert inodes[step] & inodes[step - 2], step
    for step in range(2, 11):
        assert not inodes[step] & inodes[step - 1], step
        assert verify(VerifyTarget(LocalStore(tmp_path), step_name(step))).good
