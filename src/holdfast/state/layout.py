"""How a tensor lies over the ranks. The only reader of DTensor."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from holdfast.errors import UsageError
from holdfast.state.shard import Cut, Mesh, Piece, Spread, pieces_of


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What this rank holds of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    """Of the tensor as a whole."""

    pieces: tuple[Piece, ...]
    local: torch.Tensor
    """The rank's own elements; shares its memory with the tensor."""

    spread: Spread | None = None
    """How it lies over all ranks; None for a tensor that is whole on this one, whoever has it."""


Known = MutableMapping[Any, tuple[Spread | None, tuple[Piece, ...]]]
"""Layouts found before, by mesh, placements and shape; by shape alone where there is no mesh."""


def layout_of(name: str, tensor: torch.Tensor, known: Known | None = None) -> Layout:
    """How `tensor` lies on this rank: a DTensor by its mesh, any other tensor as a whole.

    `known` is filled, and spares the work for tensors that lie alike.

    Raises:
        UsageError: a kind of tensor whose elements are not plainly there.
    """
    dtype = dtype_name(tensor.dtype)
    shape = tuple(tensor.shape)
    if isinstance(tensor, DTensor):
        local = _local(tensor)
        spread, pieces = _spread_of(name, tensor, shape, {} if known is None else known)
        held = sum(piece.region.num_elements for piece in pieces)
        if held != local.numel():
            raise UsageError(
                f"`{name}`: placements {tensor.placements} give this rank {held} elements, "
                f"its local tensor has {local.numel()}",
            )
        return Layout(dtype, shape, pieces, local, spread)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise UsageError(
            f"`{name}` is a {'meta' if tensor.is_meta else tensor.layout} tensor, "
            "which has no plain elements to keep",
            hint="store its dense parts under names of their own",
        )
    if known is None:
        return Layout(dtype, shape, pieces_of(shape, ()), _detached(tensor))
    if shape not in known:
        known[shape] = None, pieces_of(shape, ())
    return Layout(dtype, shape, known[shape][1], _detached(tensor))


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """As formats spell it."""
    return str(dtype).removeprefix("torch.")


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one: tied weights. Views of one storage are not, unless they are the
    same view; nor are tensors without elements."""
    elements = _elements(one)
    return bool(elements) and elements == _elements(other)


def _elements(tensor: torch.Tensor) -> tuple[object, ...]:
    """All that says which elements a tensor stands for; nothing where it has none."""
    local, placements = tensor, ""
    if isinstance(tensor, DTensor):
        local, placements = _local(tensor), str(tensor.placements)
    if not local.numel():
        return ()
    place = (local.device, local.data_ptr(), local.dtype, local.stride())
    # Bits by which a view stands for other values than those in memory.
    return (place, tensor.shape, placements, local.is_conj(), local.is_neg())


def _local(tensor: DTensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return _detached(tensor.to_local())
    # With gradients it is a step of autograd, which takes ten times as long.
    with torch.no_grad():
        return _detached(tensor.to_local())


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _spread_of(
    name: str, tensor: DTensor, shape: tuple[int, ...], known: Known
) -> tuple[Spread | None, tuple[Piece, ...]]:
    mesh = tensor.device_mesh
    key = (mesh, tensor.placements, shape)
    found = known.get(key)
    if found is None:
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise UsageError(f"`{name}`: this rank is not part of the tensor's mesh {mesh}")
        # One object for all that lie alike: it is compared, and sent, once.
        alike = (one for other, (one, _) in known.items() if one and other[:2] == key[:2])
        spread = next(alike, None) or Spread(
            Mesh(tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist())),
            tuple(_cut(name, placement) for placement in tensor.placements),
        )
        found = known[key] = spread, pieces_of(shape, spread.splits_at(coordinate))
    return found


def _cut(name: str, placement: Placement) -> Cut | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, Partial):
        raise UsageError(
            f"`{name}` is {placement}: no rank holds its values yet",
            hint="redistribute it to Replicate or Shard before saving",
        )
    # `_StridedShard` is a class of its own beside `Shard`, both with `dim`.
    if isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard":
        num_strides = getattr(placement, "split_factor", 1)
        return Cut(placement.dim, num_strides)  # type: ignore[attr-defined]
    raise UsageError(f"`{name}`: unknown placement {placement}")
