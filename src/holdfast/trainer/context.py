"""Context parallelism: each rank holds one slice of every sequence; attention spans all slices.

Each layer gathers the keys and values of all slices. torch's `context_parallel` needs less memory,
since it passes keys and values around a ring, but it supports only the attention kernels of GPUs.
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


def sequence_slice(seq_len: int, index: int, degree: int) -> range:
    """Return the token positions that rank `index` of `degree` ranks holds."""
    length = seq_len // degree
    return range(index * length, (index + 1) * length)


def context_parallel_attention(mesh: DeviceMesh) -> Attend:
    """Return a function that attends from this rank's queries to the keys of its own slice and of
    all earlier slices.

    The function is collective over `mesh`, forward and backward.
    """
    group, index = mesh.get_group(), mesh.get_local_rank()

    def attend(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        length = q_BHTE.shape[2]
        num_keys = (index + 1) * length
        # Every rank contributes to the gather. Keys of later slices are cut off here.
        gathered = _AllGather.apply(torch.stack((k_BKTE, v_BKTE)), group)  # type: ignore[no-untyped-call]
        k_BKSE, v_BKSE = gathered[..., :num_keys, :]
        return F.scaled_dot_product_attention(
            q_BHTE,
            k_BKSE,
            v_BKSE,
            attn_mask=causal_lower_right(length, num_keys),
            enable_gqa=True,
        )

    return attend


class _AllGather(torch.autograd.Function):
    """Concatenation of all ranks' tensors along dim -2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        gathered = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(gathered, x, group=group)
        return torch.cat(gathered, dim=-2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        # Several ranks used each slice, so their gradients are summed.
        slices = [part.contiguous() for part in grads[0].chunk(ctx.group.size(), dim=-2)]
        summed = torch.empty_like(slices[0])
        dist.reduce_scatter(summed, slices, group=ctx.group)
        return summed, None
