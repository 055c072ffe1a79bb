"""Any region that is read from tensors of several ranks has the elements of plain slicing."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.source import Source
from holdfast.comm import Solo
from holdfast.format.checksum import BLOCK_BYTES
from holdfast.format.dtypes import BY_NAME
from holdfast.format.region import Region
from holdfast.loading import read
from holdfast.loading.checkpoint import Checkpoint
from holdfast.loading.load import load_tree
from holdfast.loading.read import Wanted, read_tensors
from holdfast.state.objects import StateTree
from holdfast.state.shard import Piece
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import Store
from plans import bits, random_tensor, save_regions

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...], size: int) -> list[list[Region]]:
    """A tensor divided into a grid, each cell held by one or several of `size` ranks."""
    axes = []
    for length in shape:
        cuts = sorted({0, length, *draw(st.sets(st.integers(0, length), max_size=2))})
        axes.append([*pairwise(cuts)] or [(0, 0)])
    held: list[list[Region]] = [[] for _ in range(size)]
    for cell in product(*axes):
        region = Region(tuple(lo for lo, _ in cell), tuple(hi for _, hi in cell))
        for rank in draw(st.sets(st.integers(0, size - 1), min_size=1)):
            held[rank].append(region)
    return held


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Region(tuple(b[0] for b in bounds), tuple(b[1] for b in bounds))


SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


def check_round_trip(data: st.DataObject, store: Store) -> None:
    """Save any tensors in any grid by any ranks, then read any regions of them."""
    size = data.draw(st.integers(1, 4))
    held: dict[str, tuple[torch.Tensor, list[list[Region]]]] = {}
    for number in range(data.draw(st.integers(1, 3))):
        shape = data.draw(SHAPES)
        dtype = data.draw(st.sampled_from(sorted(BY_NAME)))
        held[f"t{number}"] = (random_tensor(dtype, shape, number), data.draw(grids(shape, size)))
    save_regions(store, "step-1", held, size)
    checkpoint = Checkpoint(Source(store, "step-1", open_manifest(store, "step-1")))
    assert {*checkpoint.names()} == {*held}
    all_of_it = [
        Wanted(name, [Piece(region, Region.whole(region.shape))], torch.empty_like(whole))
        for name, (whole, _) in held.items()
        for region in [Region.whole(whole.shape)]
    ]
    with pytest.MonkeyPatch.context() as patched:
        # Small chunks are read together, or each alone if the limit is negative.
        patched.setattr(read, "SMALL_BYTES", data.draw(st.sampled_from([-1, read.SMALL_BYTES])))
        read.read_tensors(checkpoint._source, all_of_it)
    assert all(bits(want.local) == bits(held[want.name][0]) for want in all_of_it)
    for name, (whole, _) in held.items():
        assert bits(checkpoint.read(name)) == bits(whole)
        wanted = data.draw(regions(tuple(whole.shape)))
        part = checkpoint.read(name, wanted)
        assert part.dtype == whole.dtype
        assert tuple(part.shape) == wanted.shape
        assert bits(part) == bits(whole[wanted.slices()] if whole.ndim else whole)


@given(st.data())
def test_any_region_that_any_ranks_saved_equals_slicing(data: st.DataObject) -> None:
    """G6. Method: save random bits of every dtype and shape, in a random grid over up to four
    ranks, with and without replicas. Read them whole and in a random box. In memory."""
    check_round_trip(data, MemoryStore())


@settings(max_examples=25)
@given(st.data())
def test_any_region_on_disk_equals_slicing(data: st.DataObject) -> None:
    """G6. Method: the test above in a real folder."""
    with TemporaryDirectory() as folder:
        check_round_trip(data, LocalStore(folder))


@pytest.mark.slow
@settings(max_examples=3000)
@given(st.data())
def test_very_many_regions_equal_slicing(data: st.DataObject) -> None:
    """G6. Method: the test in memory, thirty times as often."""
    check_round_trip(data, MemoryStore())


@given(st.data())
def test_a_load_fills_tensors_of_any_strides_and_no_other_memory(data: st.DataObject) -> None:
    """G6. Method: load into a view of a larger tensor: transposed, strided, with a margin. The view
    gets the saved elements, and the memory around it is unchanged. A second save from the view
    gives the same checkpoint."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    whole = torch.arange(1, prod(shape) + 1, dtype=torch.float64).reshape(shape)
    store = MemoryStore()
    save_regions(store, "step-1", {"w": (whole, [[Region.whole(shape)]])}, 1)
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    around = torch.zeros([shape[d] * steps[d] + 2 for d in order], dtype=torch.float64)
    back = [order.index(d) for d in range(len(shape))]
    view = around.permute(back)[
        tuple(slice(1, 1 + n * s, s) for n, s in zip(shape, steps, strict=True))
    ]
    assert view.shape == shape
    source = Source(store, "step-1", open_manifest(store, "step-1"))
    load_tree(source, StateTree({"w": view}), ranks=Solo())
    assert torch.equal(view, whole)
    assert int(around.count_nonzero()) == whole.numel()
    save_regions(store, "step-2", {"w": (view, [[Region.whole(shape)]])}, 1)
    again = Checkpoint(Source(store, "step-2", open_manifest(store, "step-2")))
    assert torch.equal(again.read("w"), whole)


def test_a_conjugate_or_negative_view_gets_the_saved_values() -> None:
    """G6. Method: load into conjugate and negative views, whose values differ from the bits in
    memory."""
    store, whole = MemoryStore(), torch.randn(5, dtype=torch.complex64)
    save_regions(store, "step-1", {"w": (whole, [[Region.whole((5,))]])}, 1)
    save_regions(store, "step-2", {"w": (whole.imag, [[Region.whole((5,))]])}, 1)
    conjugate = torch.zeros(5, dtype=torch.complex64).conj()
    negative = torch.zeros(5, dtype=torch.complex64).conj().imag
    for name, target, expected in (
        ("step-1", conjugate, whole),
        ("step-2", negative, whole.imag),
    ):
        source = Source(store, name, open_manifest(store, name))
        load_tree(source, StateTree({"w": target}), ranks=Solo())
        assert torch.equal(target, expected)


@given(st.integers(0, 3 * BLOCK_BYTES), st.integers(0, 3 * BLOCK_BYTES))
@settings(max_examples=30)
def test_rows_cost_their_bytes_rounded_up_to_blocks(first: int, second: int) -> None:
    """G3, G13. Method: read any rows of a large tensor of bytes. The read takes the bytes of the
    blocks that have these rows, and the elements equal those of slicing."""
    start, stop = sorted((first, second))
    source = _large()
    target = torch.empty(stop - start, dtype=torch.uint8)
    piece = Piece(Region((start,), (stop,)), Region.whole(target.shape))
    num_read = read_tensors(source, [Wanted("w", [piece], target)]) if stop > start else 0
    blocks = (-(-stop // BLOCK_BYTES) - start // BLOCK_BYTES) if stop > start else 0
    length = source.manifest.tensors["w"].nbytes
    last_is_short = stop > start and -(-stop // BLOCK_BYTES) * BLOCK_BYTES > length
    assert num_read == blocks * BLOCK_BYTES - (-length % BLOCK_BYTES if last_is_short else 0)
    assert torch.equal(target, _LARGE[start:stop])


_LARGE = torch.arange(3 * BLOCK_BYTES + 777).to(torch.uint8)
_KEPT: list[Source] = []


def _large() -> Source:
    """Save a checkpoint of one large tensor, once for all examples."""
    if not _KEPT:
        store = MemoryStore()
        save_regions(store, "step-1", {"w": (_LARGE, [[Region.whole(_LARGE.shape)]])}, 1)
        _KEPT.append(Source(store, "step-1", open_manifest(store, "step-1")))
    return _KEPT[0]


def test_each_block_between_two_windows_is_read_once() -> None:
    """G3, G13. Method: one thread reads a column of a tensor of many blocks, in windows that end
    inside blocks. It reads as many bytes as the tensor has."""
    store = MemoryStore()
    whole = torch.randn(3000, 1000)
    save_regions(store, "step-1", {"w": (whole, [[Region.whole(whole.shape)]])}, 1)
    source = Source(store, "step-1", open_manifest(store, "step-1"))
    piece = Piece(Region((0, 300), (3000, 500)), Region((0, 0), (3000, 200)))
    target = torch.empty(3000, 200)
    assert read_tensors(source, [Wanted("w", [piece], target)]) == whole.nbytes
    assert torch.equal(target, whole[:, 300:500])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_larger_than_a_window_is_read_in_every_way(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """G6, G13. Method: read 20 MiB, more than any window: whole, by rows, by columns, by a box,
    into another dtype and into a transposed target. Compare each with slicing."""
    whole = torch.randn(2560, 2048).to(dtype)
    store = LocalStore(tmp_path)
    halves = [[Region((0, 0), (1000, 2048))], [Region((1000, 0), (2560, 2048))]]
    save_regions(store, "step-1", {"w": (whole, halves)}, 2)
    checkpoint = Checkpoint(Source(store, "step-1", open_manifest(store, "step-1")))
    for box in (
        (slice(None), slice(None)),
        (slice(7, 2001), slice(None)),
        (slice(None), slice(3, 1025)),
        (slice(900, 1100), slice(1, 2)),
    ):
        assert torch.equal(checkpoint.read("w", box), whole[box])
    source = Source(store, "step-1", open_manifest(store, "step-1"))
    for target in (
        torch.zeros(2560, 2048, dtype=torch.float64),
        torch.zeros(2048, 2560, dtype=dtype).T,
    ):
        load_tree(source, StateTree({"w": target}), ranks=Solo())
        assert torch.equal(target, whole.to(target.dtype))
