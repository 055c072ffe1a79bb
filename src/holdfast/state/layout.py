"""Placement of tensors on ranks. The only module that reads placements of DTensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from holdfast.errors import UsageError
from holdfast.format.dtypes import BY_NAME
from holdfast.format.region import Region
from holdfast.state.shard import Mesh, MeshPlacement, Piece, ShardSpec, pieces_of
from holdfast.state.strides import extent_of


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """This rank's share of a tensor. Tensors with the same layout share one object."""

    dtype: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""

    pieces: tuple[Piece, ...]
    local_shape: tuple[int, ...] | None
    """Shape of the rank's own tensor; None if it has no elements."""

    placement: MeshPlacement | None
    """Placement on the mesh; None for a tensor that is whole on this rank."""

    key: _Key

    def is_of(self, tensor: torch.Tensor, local: torch.Tensor) -> bool:
        """Return whether `tensor` has this layout. `local` contains the rank's own elements."""
        dtype, mesh, placements = self.key
        if tensor.dtype is not dtype or tensor.shape != self.shape or _odd_kind(local):
            return False
        if mesh is None:
            return local is tensor
        return self.fits(local) and _mesh_of(tensor) == (mesh, placements)

    def fits(self, local: torch.Tensor) -> bool:
        """Return whether the rank's own tensor has the shape of this layout."""
        shape = self.local_shape
        return local.shape == shape if shape is not None else not local.numel()


_Key = tuple[torch.dtype, DeviceMesh | None, tuple[Placement, ...]]
"""Dtype, mesh and placements, which determine the layout together with the shape."""


class Layouts:
    """Computes layouts on this rank, each once for all tensors that share it."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[torch.Size, _Key], Layout] = {}
        self._placements: dict[tuple[DeviceMesh, tuple[Placement, ...]], MeshPlacement] = {}

    def of(self, name: str, tensor: torch.Tensor, local: torch.Tensor) -> Layout:
        """Return the layout of a DTensor on its mesh, or of any other tensor as a whole. `local`
        contains the rank's own elements."""
        check_elements(name, local)
        mesh, placements = _mesh_of(tensor)
        shape, key = tensor.shape, (tensor.dtype, mesh, placements)
        layout = self._layouts.get((shape, key))
        if layout is None:
            layout = self._layouts[shape, key] = self._make(name, tuple(shape), key)
        if mesh is not None and not layout.fits(local):
            own = layout.local_shape
            expected = "no elements" if own is None else f"shape {[*own]}"
            raise UsageError(
                f"`{name}`: this rank's local tensor has shape {[*local.shape]}, expected "
                f"{expected} for the placements {placements}",
                hint="pass `shape` and `stride` of the whole tensor to `DTensor.from_local`",
            )
        return layout

    def _make(self, name: str, shape: tuple[int, ...], key: _Key) -> Layout:
        dtype, mesh, placements = key
        if dtype_name(dtype) not in BY_NAME:
            raise UsageError(
                f"`{name}` is a tensor of {dtype}, which checkpoints do not support",
                hint=f"view it as or cast it to one of these: {', '.join(BY_NAME)}",
            )
        placement, pieces = None, pieces_of(shape, ())
        if mesh is not None:
            coordinate = mesh.get_coordinate()
            if coordinate is None:
                raise UsageError(f"`{name}`: this rank is not part of the tensor's mesh {mesh}")
            placement = self._mesh_placement(name, mesh, placements)
            pieces = pieces_of(shape, placement.splits_at(coordinate))
        own = [piece.local.stop for piece in pieces if piece.region.num_elements]
        local_shape = tuple(map(max, zip(*own, strict=True))) if own else None
        return Layout(dtype_name(dtype), shape, pieces, local_shape, placement, key)

    def _mesh_placement(
        self, name: str, mesh: DeviceMesh, placements: tuple[Placement, ...]
    ) -> MeshPlacement:
        key = mesh, placements
        if key not in self._placements:
            # Equal placements share one object: ranks compare and send each object only once.
            self._placements[key] = MeshPlacement(
                Mesh(tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist())),
                tuple(_shard_spec(name, placement) for placement in placements),
            )
        return self._placements[key]


def _mesh_of(tensor: torch.Tensor) -> tuple[DeviceMesh | None, tuple[Placement, ...]]:
    """Return the mesh and the placements of a DTensor; of other tensors, None and ()."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else (None, ())


def check_elements(name: str, local: torch.Tensor) -> None:
    """Raise a UsageError if the memory of a rank's own tensor does not contain its plain
    elements."""
    kind = _odd_kind(local)
    if kind == "meta":
        raise UsageError(
            f"`{name}` is a meta tensor, which has no elements",
            hint='allocate its module first: `module.to_empty(device="cpu")`, or "cuda"',
        )
    if kind == "freed":
        raise UsageError(
            f"`{name}` has {local.numel()} elements, but its memory was freed: its storage has "
            f"{local.untyped_storage().nbytes()} bytes, expected {_storage_bytes(local)}",
            hint="save or load before the memory is freed, or once the code that freed it has "
            "restored it",
        )
    if kind:
        raise UsageError(
            f"`{name}` is a {kind} tensor, which has no plain elements to save",
            hint="save its dense parts under names of their own",
        )


def _odd_kind(tensor: torch.Tensor) -> str:
    """Return why a tensor's memory does not contain its plain elements, such as "quantized". Return
    "" if the memory contains them."""
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return str(tensor.layout)
    nbytes = tensor.untyped_storage().nbytes()
    # Most tensors have a storage of their own.
    is_own = nbytes == tensor.nbytes and not tensor.storage_offset()
    return "" if is_own or nbytes >= _storage_bytes(tensor) else "freed"


def _storage_bytes(tensor: torch.Tensor) -> int:
    """Return how many bytes of storage the elements of a tensor need, from the start of the
    storage on."""
    extent = extent_of(tensor)
    return int(tensor.storage_offset() + extent) * tensor.itemsize if extent else 0


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rank's own elements, which share the tensor's memory.

    For a DTensor, this takes ten times as long while gradients are recorded.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as the file formats write it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def address_of(tensor: torch.Tensor) -> int:
    """Return the address of the rank's own elements; 0 if there are none."""
    return local_of(tensor).data_ptr()


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are tied: the same view of the same memory, with elements."""
    elements = elements_of(one)
    return bool(elements) and elements == elements_of(other)


def elements_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a key that is equal for tied tensors only; empty for a tensor without elements."""
    local = local_of(tensor)
    placements = str(tensor.placements) if isinstance(tensor, DTensor) else ""
    if not local.numel():
        return ()
    place = (local.device, local.data_ptr(), local.dtype, local.stride())
    # A view with the conjugate or negative bit set has other values than the memory.
    return (place, tensor.shape, placements, local.is_conj(), local.is_neg())


def _shard_spec(name: str, placement: Placement) -> ShardSpec | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, Partial):
        raise UsageError(
            f"`{name}` is {placement}: no rank holds its values yet",
            hint="redistribute it to Replicate or Shard before saving",
        )
    # `_StridedShard` need not derive from `Shard`, but has a `dim` as well.
    if isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard":
        num_strides = getattr(placement, "split_factor", 1)
        return ShardSpec(placement.dim, num_strides)  # type: ignore[attr-defined]
    raise UsageError(f"`{name}`: unknown placement {placement}")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, readable and writable. They stay valid after the
    last other reference to the tensor has ended."""
    nbytes = tensor.nbytes
    if not nbytes:
        return memoryview(bytearray())
    # By the address, since numpy takes two to four times as long, which matters for many small
    # tensors.
    memory = _memory_type(nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor
    return memoryview(memory).cast("B")


@lru_cache(maxsize=1024)
def _memory_type(nbytes: int) -> Any:
    return ctypes.c_ubyte * nbytes


def box_of(tensor: torch.Tensor, local: Region) -> torch.Tensor:
    """Return a view of a box of `tensor`, which must not require gradients."""
    whole = local.stop == tensor.shape and not any(local.start)
    return tensor if whole else tensor[local.slices()]
