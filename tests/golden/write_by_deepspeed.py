"""Write a small checkpoint of DeepSpeed's ZeRO, and its whole tensors, by two ranks:

    torchrun --nproc_per_node 2 tests/golden/write_by_deepspeed.py STAGE FOLDER

The folders `zero-1`, `zero-2` and `zero-3` were made with DeepSpeed 0.19.8 on a CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file


class Net(torch.nn.Module):
    """Parameters of odd sizes, in two groups; buffers; shared and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(7, 5)
        self.bn = torch.nn.BatchNorm1d(5)
        self.b = torch.nn.Linear(5, 7, bias=False)
        self.tied = torch.nn.Linear(5, 7, bias=False)
        self.tied.weight = self.b.weight
        self.frozen = torch.nn.Linear(7, 7)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.frozen(self.tied(torch.relu(self.bn(self.a(x)))))
        return found


def write(stage: int, folder: str) -> None:
    """Train for three steps, and save."""
    import deepspeed  # type: ignore[import-not-found]
    from deepspeed.utils.zero_to_fp32 import (  # type: ignore[import-not-found]
        get_fp32_state_dict_from_zero_checkpoint,
    )

    torch.manual_seed(0)
    net = Net()
    groups: list[dict[str, Any]] = [
        {"params": [net.a.weight, net.b.weight], "weight_decay": 0.1},
        {"params": [net.a.bias, *net.bn.parameters()], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.AdamW(groups, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    for step in range(3):
        torch.manual_seed(step * 10 + engine.global_rank)
        engine.backward(engine(torch.randn(4, 7)).square().mean())
        engine.step()
    engine.save_checkpoint(folder, tag="global_step3")
    dist.barrier()
    if engine.global_rank == 0:
        whole = get_fp32_state_dict_from_zero_checkpoint(folder)
        save_file({n: t.clone() for n, t in whole.items()}, f"{folder}/fp32.safetensors")


if __name__ == "__main__":
    write(int(sys.argv[1]), sys.argv[2])
