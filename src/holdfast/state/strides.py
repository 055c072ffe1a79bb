"""How the elements of a tensor lie in memory: in which order of its dims, and whether apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def order_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the dims of a strided tensor without gaps, from the one with the largest stride to the
    one with the smallest. Of other tensors, return the dims in row-major order.

    >>> order_of(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    (0, 2, 3, 1)
    >>> order_of(torch.zeros(2, 3).t()), order_of(torch.zeros(9)[::3])
    ((1, 0), (0,))
    """
    row_major = tuple(range(tensor.dim()))
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return row_major
    order = tuple(sorted(row_major, key=lambda dim: tensor.stride()[dim], reverse=True))
    return order if tensor.permute(order).is_contiguous() else row_major


def order_text(order: Sequence[int]) -> str:
    """Format an order of dims, as the node of a tensor stores it; "" for row-major order.

    >>> order_text((0, 2, 3, 1)), order_text((0, 1))
    ('0 2 3 1', '')
    """
    return "" if list(order) == sorted(order) else " ".join(map(str, order))


def order_in(stored: Mapping[str, str], num_dims: int) -> tuple[int, ...]:
    """Return the order of dims in the node of a tensor; row-major if the node has none that fits.

    >>> order_in({"order": "1 0"}, 2), order_in({}, 2), order_in({"order": "1 1"}, 2)
    ((1, 0), (0, 1), (0, 1))
    """
    row_major = tuple(range(num_dims))
    texts = stored.get("order", "").split()
    order = tuple(int(text) for text in texts if text.isdecimal())
    return order if sorted(order) == list(row_major) else row_major


def extent_of(tensor: torch.Tensor) -> int:
    """Return the number of places from the first element of a strided tensor to its last, gaps
    included; 0 without elements.

    >>> extent_of(torch.zeros(9)[::4]), extent_of(torch.zeros(2, 0)), extent_of(torch.zeros(()))
    (9, 0, 1)
    """
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.numel()
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * step for size, step in dims) + 1


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether several elements of a tensor share memory.

    >>> overlaps_itself(torch.zeros(1).expand(4)), overlaps_itself(torch.zeros(5).unfold(0, 3, 1))
    (True, True)
    >>> overlaps_itself(torch.zeros(4, 4)[::2, 1:]), overlaps_itself(torch.zeros(1).expand(1))
    (False, False)
    """
    if tensor.layout is not torch.strided or tensor.is_contiguous() or not tensor.numel():
        return False
    dims = [(step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True)]
    extent = 1
    for step, size in sorted(dim for dim in dims if dim[1] > 1):
        if not step:
            return True
        if step < extent:
            return _has_repeats(tensor)
        extent += (size - 1) * step
    return False


def _has_repeats(tensor: torch.Tensor) -> bool:
    """Like `overlaps_itself`, by marking each element's place. Strides such as 2 and 3 need this:
    whether elements meet depends on the sizes too."""
    marks = torch.zeros(extent_of(tensor), dtype=torch.bool)
    marks.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(marks.sum()) < tensor.numel()
