"""Context parallelism: each rank has a stretch of every sequence, attention goes across them.

Keys and values are gathered, queries stay. torch's `context_parallel`, which passes keys and values
round a ring, knows the attention kernels of GPUs alone; what is here runs on any device. It costs
the memory of one layer's keys and values at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from holdfast.trainer.model import Attend


def stretch_of(seq_len: int, index: int, degree: int) -> range:
    """Positions of the tokens that rank `index` of `degree` has."""
    length = seq_len // degree
    return range(index * length, (index + 1) * length)


def attend_across(mesh: DeviceMesh) -> Attend:
    """Causal attention of this rank's queries to the keys of its own stretch and all before.

    Collective over `mesh`, forward and backward.
    """
    group, index = mesh.get_group(), mesh.get_local_rank()

    def attend(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        length = q_BHTE.shape[2]
        seen = (index + 1) * length
        # Later stretches are gathered too, and cut off: a rank has to give its own to the others.
        k_BKSE, v_BKSE = _gathered(torch.stack((k_BKTE, v_BKTE)), group)[..., :seen, :]
        return F.scaled_dot_product_attention(
            *(q_BHTE, k_BKSE, v_BKSE),
            attn_mask=causal_lower_right(length, seen),
            enable_gqa=True,
        )

    return attend


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return out


class _Gather(torch.autograd.Function):
    """All ranks' tensors, joined along the last dim but one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        every = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(every, x, group=group)
        return torch.cat(every, dim=-2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        # Each rank's keys were seen by several, whose gradients add up.
        stretches = [part.contiguous() for part in grads[0].chunk(ctx.group.size(), dim=-2)]
        mine = torch.empty_like(stretches[0])
        dist.reduce_scatter(mine, stretches, group=ctx.group)
        return mine, None
