"""A checkpoint saved in any layout loads in any other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.source import Source
from holdfast.format.checksum import BLOCK_BYTES
from holdfast.format.dtypes import BY_NAME
from holdfast.loading.read import Wanted, read_tensors
from holdfast.planning.write_plan import LocalPlan, LocalTensor, merge_local_plans, plan
from holdfast.state.shard import Mesh, MeshPlacement, Piece, ShardSpec, pieces_of
from holdfast.storage.memory import MemoryStore
from plans import bits, random_tensor, save_by_plan

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@st.composite
def placements(draw: st.DrawFn, num_dims: int, ranks_max: int = 12) -> MeshPlacement:
    """Draw a mesh and a placement on it: replicated, sharded, sharded in strides as FSDP over
    tensor parallelism does; also dims smaller than their axis."""
    sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
    shape = draw(sizes.filter(lambda shape: prod(shape) <= ranks_max))
    cuts: list[ShardSpec | None] = []
    for _ in shape:
        cut = ShardSpec(
            draw(st.integers(0, max(num_dims - 1, 0))), draw(st.sampled_from([1, 1, 2, 3]))
        )
        cuts.append(draw(st.sampled_from([None, cut])) if num_dims else None)
    return MeshPlacement(Mesh(shape, tuple(draw(st.permutations(range(prod(shape)))))), tuple(cuts))


def saved(whole: torch.Tensor, placement: MeshPlacement) -> Source:
    """A checkpoint of one tensor, saved by the ranks of a mesh."""
    dtype = str(whole.dtype).removeprefix("torch.")
    local_plan = LocalPlan({"w": LocalTensor(dtype, tuple(whole.shape), ("w",), placement)})
    size = len(placement.mesh.ranks)
    store = MemoryStore()
    save_by_plan(
        store, "step-1", plan(merge_local_plans([{"w": local_plan}] * size)), {"w": whole}, size
    )
    return Source(store, "step-1", open_manifest(store, "step-1"))


def loaded(
    source: Source, whole: torch.Tensor, coordinate: Sequence[int], placement: MeshPlacement
) -> tuple[Sequence[Piece], torch.Tensor, int]:
    """Return the local tensor of one rank of another mesh, and the bytes that it read."""
    pieces = pieces_of(tuple(whole.shape), placement.splits_at(coordinate))
    sizes = [max((p.local.stop[d] for p in pieces), default=0) for d in range(whole.ndim)]
    nbytes = prod(sizes) * whole.itemsize
    local = torch.zeros(nbytes, dtype=torch.uint8).view(whole.dtype).view(sizes)
    return pieces, local, read_tensors(source, [Wanted("w", pieces, local)])


def check(whole: torch.Tensor, before: MeshPlacement, after: MeshPlacement) -> int:
    """Save with one layout and load with another; every rank must get the result of slicing.
    Returns the bytes read by all ranks."""
    source, read = saved(whole, before), 0
    for coordinate in product(*map(range, after.mesh.shape)):
        pieces, local, nbytes = loaded(source, whole, coordinate, after)
        read += nbytes
        for piece in pieces:
            mine = local[piece.local.slices()] if whole.ndim else local
            meant = whole[piece.region.slices()] if whole.ndim else whole
            assert bits(mine) == bits(meant)
    return read


def check_any(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    whole = random_tensor(data.draw(st.sampled_from(sorted(BY_NAME))), shape, seed=len(shape))
    check(whole, data.draw(placements(len(shape))), data.draw(placements(len(shape))))


@settings(max_examples=60)
@given(st.data())
def test_any_layout_loads_on_any_other(data: st.DataObject) -> None:
    """G6, G9. Method: random placements on random meshes of up to 12 ranks, every dtype (fp8 and
    complex included), random bits, 0-d and empty tensors; every rank of the second mesh against
    plain slicing."""
    check_any(data)


@pytest.mark.slow
@settings(max_examples=2000)
@given(st.data())
def test_very_many_pairs_of_layouts_load(data: st.DataObject) -> None:
    """G6, G9. Method: the test above, thirty times as often."""
    check_any(data)


def wanted_bytes(whole: torch.Tensor, placement: MeshPlacement) -> int:
    """Bytes that all ranks want; replicas count once each."""
    everyone = product(*map(range, placement.mesh.shape))
    regions = [
        piece.region for at in everyone for piece in pieces_of(whole.shape, placement.splits_at(at))
    ]
    return sum(region.num_elements for region in regions) * whole.itemsize


def rows_only(placement: MeshPlacement) -> MeshPlacement:
    return MeshPlacement(
        placement.mesh, tuple(cut and ShardSpec(0, cut.num_strides) for cut in placement.shards)
    )


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_row_shards_read_only_their_bytes(data: st.DataObject) -> None:
    """G13. Method: save rows of two blocks each, sharded by rows over any two meshes. The ranks
    read exactly the bytes that they want."""
    whole = torch.arange(7 * 2 * BLOCK_BYTES).to(torch.uint8).view(7, 2 * BLOCK_BYTES)
    before, after = (rows_only(data.draw(placements(2, ranks_max=6))) for _ in range(2))
    assert check(whole, before, after) == wanted_bytes(whole, after)


@pytest.mark.parametrize("num_columns", [2, 4, 8])
def test_column_shards_read_only_their_bytes_if_a_block_wide(
    num_columns: int,
) -> None:
    """G13. Method: save rows of four blocks by rows, and load them by columns. Runs of a block or
    more are read alone. With shorter runs, the load reads at most `row / slice` times the wanted
    bytes."""
    whole = torch.arange(6 * 4 * BLOCK_BYTES).to(torch.uint8).view(6, 4 * BLOCK_BYTES)
    before = MeshPlacement(Mesh((3,), (0, 1, 2)), (ShardSpec(0),))
    after = MeshPlacement(Mesh((num_columns,), tuple(range(num_columns))), (ShardSpec(1),))
    read, wanted = check(whole, before, after), wanted_bytes(whole, after)
    assert read == wanted if num_columns <= 4 else read <= wanted * num_columns
