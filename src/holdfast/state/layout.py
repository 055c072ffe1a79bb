"""How a tensor lies over the ranks. The only reader of DTensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from holdfast.errors import UsageError
from holdfast.format.dtypes import BY_NAME
from holdfast.state.shard import Mesh, MeshPlacement, Piece, ShardSpec, pieces_of


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What this rank holds of a tensor. One object for all tensors that lie alike."""

    dtype: str
    shape: tuple[int, ...]
    """Of the tensor as a whole."""

    pieces: tuple[Piece, ...]
    num_elements: int
    """Of all pieces."""

    placement: MeshPlacement | None
    """How it lies over all ranks; None for a tensor that is whole on this one, whoever has it."""

    key: _Key

    def is_of(self, tensor: torch.Tensor, local: torch.Tensor) -> bool:
        """Whether `tensor` lies like this; `local` are the rank's own elements."""
        dtype, mesh, placements = self.key
        if tensor.dtype is not dtype or tensor.shape != self.shape:
            return False
        if mesh is None:
            return local is tensor and _is_plain(tensor)
        return local.numel() == self.num_elements and _mesh_of(tensor) == (mesh, placements)


_Key = tuple[torch.dtype, DeviceMesh | None, tuple[Placement, ...]]
"""What decides, beside the shape."""


class Layouts:
    """Finds out how tensors lie on this rank; what lies alike, once."""

    def __init__(self) -> None:
        self._alike: dict[tuple[torch.Size, _Key], Layout] = {}
        self._spreads: dict[tuple[DeviceMesh, tuple[Placement, ...]], MeshPlacement] = {}

    def of(self, name: str, tensor: torch.Tensor, local: torch.Tensor) -> Layout:
        """How `tensor` lies: a DTensor by its mesh, any other as a whole. `local` are the rank's
        own elements.

        Raises:
            UsageError: a kind of tensor whose elements are not plainly there.
        """
        mesh, placements = _mesh_of(tensor)
        if tensor.is_meta:
            raise UsageError(
                f"`{name}` is a meta tensor, which has no elements",
                hint='give its module memory first: `module.to_empty(device="cpu")`, or "cuda"',
            )
        if mesh is None and not _is_plain(tensor):
            raise UsageError(
                f"`{name}` is a {_kind_of(tensor)} tensor, which has no plain elements to keep",
                hint="store its dense parts under names of their own",
            )
        key = tensor.dtype, mesh, placements
        layout = self._alike.get((tensor.shape, key))
        if layout is None:
            layout = self._alike[tensor.shape, key] = self._lie(name, tuple(tensor.shape), key)
        if layout.num_elements != local.numel():
            raise UsageError(
                f"`{name}`: placements {placements} give this rank {layout.num_elements} "
                f"elements, its local tensor has {local.numel()}",
            )
        return layout

    def _lie(self, name: str, shape: tuple[int, ...], key: _Key) -> Layout:
        dtype, mesh, placements = key
        if dtype_name(dtype) not in BY_NAME:
            raise UsageError(
                f"`{name}` is a tensor of {dtype}, which no checkpoint can hold",
                hint=f"view or cast it as one of these: {', '.join(BY_NAME)}",
            )
        placement, pieces = None, pieces_of(shape, ())
        if mesh is not None:
            coordinate = mesh.get_coordinate()
            if coordinate is None:
                raise UsageError(f"`{name}`: this rank is not part of the tensor's mesh {mesh}")
            placement = self._spread(name, mesh, placements)
            pieces = pieces_of(shape, placement.splits_at(coordinate))
        num_elements = sum(piece.region.num_elements for piece in pieces)
        return Layout(dtype_name(dtype), shape, pieces, num_elements, placement, key)

    def _spread(
        self, name: str, mesh: DeviceMesh, placements: tuple[Placement, ...]
    ) -> MeshPlacement:
        key = mesh, placements
        if key not in self._spreads:
            # One object for all that lie alike: it is compared, and sent, once.
            self._spreads[key] = MeshPlacement(
                Mesh(tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist())),
                tuple(_cut(name, placement) for placement in placements),
            )
        return self._spreads[key]


def _mesh_of(tensor: torch.Tensor) -> tuple[DeviceMesh | None, tuple[Placement, ...]]:
    """What a DTensor lies on, and how."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else (None, ())


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its elements are in its memory, as they are."""
    odd = tensor.is_meta or tensor.is_quantized or tensor.is_nested
    return tensor.layout is torch.strided and not odd


def _kind_of(tensor: torch.Tensor) -> str:
    """What makes a tensor none whose elements are plainly there."""
    for kind in ("meta", "quantized", "nested"):
        if getattr(tensor, f"is_{kind}"):
            return kind
    return str(tensor.layout)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own elements, in the memory of the tensor; any but a DTensor is its own.

    Of a DTensor it takes ten times as long where gradients are recorded.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
    local = local_of(tensor)
    placements = str(tensor.placements) if isinstance(tensor, DTensor) else ""
    if not local.numel():
        return ()
    place = (local.device, local.data_ptr(), local.dtype, local.stride())
    # Bits by which a view stands for other values than those in memory.
    return (place, tensor.shape, placements, local.is_conj(), local.is_neg())


def _cut(name: str, placement: Placement) -> ShardSpec | None:
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
        return ShardSpec(placement.dim, num_strides)  # type: ignore[attr-defined]
    raise UsageError(f"`{name}`: unknown placement {placement}")


_SPELLED_BY_NUMPY = {torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8}
"""Dtypes whose numpy arrays are buffers of a plain C type."""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which has no gradient: to read, or to write."""
    if tensor.dtype in _SPELLED_BY_NUMPY and tensor.numel():
        # Of thousands of small tensors: a third of the time that the other way takes.
        return tensor.numpy().data.cast("B")
    # Not `reshape(-1)`: a single element counts as contiguous whatever its stride.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
