"""Initial weights that depend only on the seed, not on the parallelism.

A weight is drawn in bands of rows, each by its own generator. The seed of a band is made from the
run's seed, the weight's name and the band's number. A rank draws only the bands that overlap its
shard, and every layout starts from the same model.
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

BAND_ELEMENTS = 1 << 20
"""Approximate number of elements in a band. Changing it changes the initial weights."""


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill `model`, which must have left the meta device, with its initial weights."""
    model.tie()
    model.rope.copy_(model.rope_table())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            # The scale of a norm.
            parameter.fill_(1.0)
            continue
        # Smaller for layers that add to the residual stream, which would otherwise grow with depth.
        residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight", "experts.w2"))
        std = STD / math.sqrt(2 * model.flavor.num_layers) if residual else STD
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        indices = [_local_indices(parameter, dim) for dim in range(parameter.dim())]
        if parameter.dim() == 2:
            _draw(local, indices, parameter.shape, f"{seed}/{name}", std)
            continue
        # The matrix of each expert is drawn like a separate weight.
        for matrix, expert in zip(local, indices[0].tolist(), strict=True):
            _draw(matrix, indices[1:], parameter.shape[1:], f"{seed}/{name}/{expert}", std)


def _draw(
    local: Tensor, indices: Sequence[Tensor], shape: Sequence[int], key: str, std: float
) -> None:
    """Fill `local`, which holds the rows and columns `indices` of a matrix of `shape`, with random
    numbers of normal distribution. `std`: standard deviation. `key`: text from which the seeds
    are made."""
    (rows, columns), (num_rows, num_columns) = indices, shape
    band_rows = max(1, BAND_ELEMENTS // num_columns)
    for band in sorted(set((rows // band_rows).tolist())):
        start = band * band_rows
        drawn = torch.empty(min(band_rows, num_rows - start), num_columns)
        digest = hashlib.blake2b(f"{key}/{band}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn.normal_(0.0, std, generator=generator)
        targets = torch.nonzero(rows // band_rows == band).flatten()
        local[targets] = drawn[rows[targets] - start][:, columns].to(local)


def _local_indices(parameter: Tensor, dim: int) -> Tensor:
    """Return the indices along `dim` of the elements of `parameter` that this rank holds."""
    shape = [1] * parameter.dim()
    shape[dim] = -1
    indices = torch.arange(parameter.shape[dim])
    if not isinstance(parameter, DTensor):
        return indices
    # Sharding the indices like the weight gives the local indices, even if shards are uneven.
    placements = [
        placement if getattr(placement, "dim", None) == dim else Replicate()
        for placement in parameter.placements
    ]
    sharded = distribute_tensor(
        indices.view(shape), parameter.device_mesh, placements, src_data_rank=None
    )
    return sharded.to_local().flatten().cpu()
