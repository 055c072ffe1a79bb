"""The host copy of what is to be written: here, one piece at a time."""

from __future__ import annotations

import torch

from holdfast.format.region import Region


def host_bytes(tensor: torch.Tensor, local: Region, dtype: torch.dtype | None) -> memoryview:
    """Row-major bytes of a box of `tensor` in host memory, converted to `dtype` where one is given.

    Shares memory with the tensor where it can: plain, contiguous, on the CPU, its dtype unchanged.
    """
    piece = tensor[local.slices()] if tensor.ndim else tensor
    piece = piece.detach().resolve_conj().resolve_neg()
    if dtype is not None:
        piece = piece.to(dtype)
    host = piece.contiguous().cpu()
    # Not `reshape(-1)`: a single element counts as contiguous whatever its stride.
    return host.as_strided((host.numel(),), (1,)).view(torch.uint8).numpy().data
