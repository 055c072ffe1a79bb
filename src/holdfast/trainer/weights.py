"""Initial weights that depend on the seed and on nothing else.

A weight is drawn in blocks of rows, each from a generator of its own, seeded by the run's seed,
the weight's name and the block's number. So a rank draws only the blocks that it holds a part of,
and any layout (one process, FSDP, tensor parallel, both) starts from the same model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from holdfast.trainer.model import Transformer

STD = 0.02
"""Standard deviation of a matrix's initial weights."""

BLOCK_ELEMENTS = 1 << 20
"""About how many elements are drawn at a time; changing it changes every model's start."""


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill `model`, which has left the meta device, with its initial weights, in place."""
    model.tie()
    model.rope.copy_(model.rope_table())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            # The scale of a norm.
            parameter.fill_(1.0)
            continue
        # What adds to the residual stream starts smaller, or the stream would grow with depth.
        adds = name.endswith(("attention.wo.weight", "feed_forward.w2.weight", "experts.w2"))
        std = STD / math.sqrt(2 * model.flavor.num_layers) if adds else STD
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held = [_held(parameter, dim) for dim in range(parameter.dim())]
        if parameter.dim() == 2:
            _draw(local, held, parameter.shape, f"{seed}/{name}", std)
            continue
        # A stack of matrices, each drawn as if it were a weight of its own.
        for matrix, index in zip(local, held[0].tolist(), strict=True):
            _draw(matrix, held[1:], parameter.shape[1:], f"{seed}/{name}/{index}", std)


def _draw(
    local: Tensor, held: Sequence[Tensor], shape: Sequence[int], key: str, std: float
) -> None:
    """Fill `local`, which holds these rows and columns of a matrix of `shape`."""
    (rows, columns), (num_rows, num_columns) = held, shape
    block_rows = max(1, BLOCK_ELEMENTS // num_columns)
    for block in sorted(set((rows // block_rows).tolist())):
        start = block * block_rows
        drawn = torch.empty(min(block_rows, num_rows - start), num_columns)
        drawn.normal_(0.0, std, generator=_generator(f"{key}/{block}"))
        wanted = torch.nonzero(rows // block_rows == block).flatten()
        local[wanted] = drawn[rows[wanted] - start][:, columns].to(local)


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _held(parameter: Tensor, dim: int) -> Tensor:
    """Indices along `dim` of the elements that this rank holds."""
    shape = [1] * parameter.dim()
    shape[dim] = -1
    every = torch.arange(parameter.shape[dim])
    if not isinstance(parameter, DTensor):
        return every
    # Cutting the indices as the weight was cut needs no knowledge of how that is done.
    placements = [
        placement if getattr(placement, "dim", None) == dim else Replicate()
        for placement in parameter.placements
    ]
    cut = distribute_tensor(
        every.view(shape), parameter.device_mesh, placements, src_data_rank=None
    )
    return cut.to_local().flatten().cpu()
