"""Elements that a rank holds, compared with torch's own sharding."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from holdfast.format.region import first_overlap
from holdfast.state.shard import Piece, Split, pieces_of

SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose elements are their own positions."""
    return torch.arange(prod(shape)).reshape(shape)


def rebuilt(shape: tuple[int, ...], pieces: tuple[Piece, ...], local: torch.Size) -> torch.Tensor:
    """The rank's local tensor, filled from the whole one by its pieces."""
    mine = torch.full(local, -1)
    for piece in pieces:
        mine[piece.local.slices()] = numbered(shape)[piece.region.slices()]
    return mine


@st.composite
def plain_splits(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Dim and number of parts for each mesh axis."""
    dims = st.integers(0, len(shape) - 1)
    return draw(st.lists(st.tuples(dims, st.integers(1, 5)), max_size=3))


@given(st.data())
def test_pieces_are_those_of_torch_chunk_applied_in_turn(data: st.DataObject) -> None:
    """G6. Method: `torch.chunk` on the numbered tensor, one axis after the other, for every rank of
    the mesh; chunks that torch does not return are empty. The pieces of all ranks are the whole
    tensor."""
    shape = data.draw(SHAPES)
    axes = data.draw(plain_splits(shape))
    regions = []
    for coordinate in product(*(range(parts) for _, parts in axes)):
        mine = numbered(shape)
        for (dim, parts), index in zip(axes, coordinate, strict=True):
            chunks = mine.chunk(parts, dim)
            empty = mine.narrow(dim, 0, 0)
            mine = chunks[index] if index < len(chunks) else empty
        splits = [Split(d, n, i) for (d, n), i in zip(axes, coordinate, strict=True)]
        pieces = pieces_of(shape, splits)
        if not all(shape):
            assert len(pieces) == 1, "a tensor without elements is not forgotten"
            continue
        assert torch.equal(rebuilt(shape, pieces, mine.shape), mine)
        regions += [piece.region for piece in pieces]
    if all(shape):
        assert first_overlap(regions) is None
        assert sum(region.num_elements for region in regions) == prod(shape)


@st.composite
def placements_of(
    draw: st.DrawFn, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[Placement, ...]]:
    """A mesh, and placements on it: replicated, sharded, sharded in strides."""
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    kinds: list[Placement] = []
    for _ in mesh:
        dim = draw(st.integers(0, len(shape) - 1))
        strided = _StridedShard(dim, split_factor=draw(st.integers(1, 4)))
        kinds.append(draw(st.sampled_from([Replicate(), Shard(dim), strided])))
    return mesh, tuple(kinds)


def split_of(placement: Placement, parts: int, index: int) -> Split | None:
    if isinstance(placement, _StridedShard):
        return Split(placement.dim, parts, index, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Split(placement.dim, parts, index)
    return None


@given(st.data())
def test_pieces_begin_at_the_offsets_of_dtensor(data: st.DataObject) -> None:
    """G6, G10. Method: torch's `_compute_local_shape_and_global_offset` for any mesh and
    placements, uneven sizes and empty ranks included: local shape and first element."""
    shape = data.draw(SHAPES.filter(all))
    mesh, placements = data.draw(placements_of(shape))
    for coordinate in product(*map(range, mesh)):
        local, offset = _compute_local_shape_and_global_offset(
            shape, mesh, [*coordinate], placements
        )
        splits = [
            split
            for p, n, i in zip(placements, mesh, coordinate, strict=True)
            if (split := split_of(p, n, i))
        ]
        pieces = pieces_of(shape, splits)
        assert sum(piece.region.num_elements for piece in pieces) == prod(local)
        if prod(local):
            mine = rebuilt(shape, pieces, torch.Size(local))
            assert (mine >= 0).all(), "every element of the rank's tensor comes from somewhere"
            assert len({*mine.flatten().tolist()}) == mine.numel(), "and none twice"
            assert pieces[0].region.start == tuple(offset)


@given(SHAPES.filter(all), st.integers(1, 4), st.integers(1, 4))
def test_fsdp_over_tensor_parallelism_shards_every_element_once(
    shape: tuple[int, ...], dp: int, tp: int
) -> None:
    """G6. Method: FSDP2's strided shard over tensor parallelism against its definition: torch.chunk
    over tp, then over dp. If tp does not divide the dim evenly, torch cuts differently, but each
    element still has one owner."""
    owned = []
    for i, j in product(range(dp), range(tp)):
        pieces = pieces_of(shape, [Split(0, dp, i, tp), Split(0, tp, j)])
        owned += [piece.region for piece in pieces]
        if shape[0] % (tp * dp) == 0:
            meant = numbered(shape).chunk(tp)[j].chunk(dp)[i]
            assert torch.equal(rebuilt(shape, pieces, meant.shape), meant)
    assert first_overlap(owned) is None
    assert sum(region.num_elements for region in owned) == prod(shape)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0, 2)])
def test_a_tensor_without_elements_has_one_empty_piece_on_every_rank(shape: tuple[int]) -> None:
    """G6. Method: make the pieces with and without sharding."""
    for splits in ([], [Split(0, 4, 3)]):
        (piece,) = pieces_of(shape, splits)
        assert piece.region.shape == shape


def test_a_0_d_tensor_is_one_piece() -> None:
    """G6. Method: make the pieces of a 0-d tensor."""
    (piece,) = pieces_of((), ())
    assert piece.region.num_elements == 1
