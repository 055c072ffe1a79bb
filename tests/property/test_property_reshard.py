"""Read plans give the same elements as plain slicing."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import DamagedError
from holdfast.format.manifest import Chunk, Span, TensorEntry
from holdfast.format.region import Region
from holdfast.format.torchzip import contiguous_strides
from holdfast.planning.read_plan import RUN_BYTES_MIN, ByteRange, byte_ranges, read_items


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Region(tuple(b[0] for b in bounds), tuple(b[1] for b in bounds))


SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)
ITEMSIZES = st.sampled_from([1, 2, 8, RUN_BYTES_MIN // 4, RUN_BYTES_MIN])
"""Sizes of an element. The large ones make rows of few elements longer than the shortest run that
is read alone. No tensor of such a size is made."""


def taken(stored: ByteRange, chunk: np.ndarray, itemsize: int) -> np.ndarray:
    """Elements that a reader takes from the bytes of a range, by the strides of the chunk."""
    assert stored.start % itemsize == 0
    elements = chunk.reshape(-1)[stored.start // itemsize : stored.stop // itemsize]
    assert len(elements) * itemsize == stored.stop - stored.start, "inside of the chunk"
    strides = contiguous_strides(chunk.shape)
    reach = sum((n - 1) * s for n, s in zip(stored.box.shape, strides, strict=True)) + 1
    assert reach == len(elements), "from the first element of the box to its last, no further"
    return np.lib.stride_tricks.as_strided(
        elements, stored.box.shape, tuple(s * elements.itemsize for s in strides)
    )


@settings(max_examples=200)
@given(st.data())
def test_byte_ranges_join_to_the_slice(data: st.DataObject) -> None:
    """G6. Method: plan the reads of any box of a chunk with numbered elements, with any window.
    Each element of the box is in exactly one range and equals that of slicing. A range with gaps
    fits the window, or is one run."""
    shape, itemsize = data.draw(SHAPES), data.draw(ITEMSIZES)
    box, window = data.draw(boxes(shape)), data.draw(st.integers(1, 400)) * itemsize
    chunk = np.arange(prod(shape)).reshape(shape)
    wanted = chunk[box.slices()]
    found = np.full(box.shape, -1)
    for stored in byte_ranges(box, shape, itemsize, window):
        assert (found[stored.box.slices()] == -1).all(), "no element comes twice"
        found[stored.box.slices()] = taken(stored, chunk, itemsize)
        inside = stored.box.num_elements * itemsize
        assert stored.contiguous == (stored.stop - stored.start == inside)
        assert stored.contiguous or stored.stop - stored.start <= window
    assert np.array_equal(found, wanted)


@given(st.data())
def test_whole_rows_are_one_range_without_other_bytes(data: st.DataObject) -> None:
    """G13. Method: plan the reads of whole rows of any tensor, as in row shards. With any window
    there is one range, with exactly the wanted bytes."""
    shape = data.draw(SHAPES.filter(bool))
    lo, hi = sorted((data.draw(st.integers(0, shape[0])), data.draw(st.integers(0, shape[0]))))
    box = Region((lo, *[0] * (len(shape) - 1)), (hi, *shape[1:]))
    found = list(byte_ranges(box, shape, 8, 1))
    assert sum(stored.stop - stored.start for stored in found) == box.num_elements * 8
    assert len(found) == (1 if box.num_elements else 0)


@given(st.data())
def test_long_runs_are_read_without_the_gaps_between_them(data: st.DataObject) -> None:
    """G13. Method: plan the reads of columns of a matrix whose runs have at least `RUN_BYTES_MIN`
    bytes. The ranges have exactly the wanted bytes."""
    height, width = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    lo, hi = sorted((data.draw(st.integers(0, width)), data.draw(st.integers(0, width))))
    box = Region((0, lo), (height, hi))
    found = list(byte_ranges(box, (height, width), RUN_BYTES_MIN, 8 * RUN_BYTES_MIN))
    assert sum(stored.stop - stored.start for stored in found) == box.num_elements * RUN_BYTES_MIN


@given(st.data())
def test_short_runs_cost_at_most_the_rows_around_them(data: st.DataObject) -> None:
    """G13. Method: plan the reads of any box. The ranges have at most the bytes from its first
    element to its last."""
    shape = data.draw(SHAPES)
    box = data.draw(boxes(shape))
    read = sum(stored.stop - stored.start for stored in byte_ranges(box, shape, 4, 64))
    if box.num_elements:
        strides = contiguous_strides(shape)
        last = sum((n - 1) * s for n, s in zip(box.shape, strides, strict=True)) + 1
        assert box.num_elements * 4 <= read <= last * 4
    else:
        assert read == 0


def entry_of(shape: tuple[int, ...], regions: list[Region]) -> TensorEntry:
    chunks = tuple(Chunk(region, "f", Span(0, 0)) for region in regions)
    return TensorEntry("float32", shape, chunks, ("w",))


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """A tensor divided into a grid, its cells in any order."""
    cells = [Region((), ())]
    for size in shape:
        cuts = sorted({0, size, *draw(st.sets(st.integers(0, size), max_size=2))})
        cells = [
            Region((*cell.start, lo), (*cell.stop, hi))
            for cell in cells
            for lo, hi in pairwise(cuts)
        ]
    return draw(st.permutations(cells))


@given(st.data())
def test_every_wanted_element_comes_from_the_one_chunk_that_holds_it(data: st.DataObject) -> None:
    """G6. Method: any grid of chunks, any wanted box; the read items cover the box once, each
    within its chunk."""
    shape = data.draw(SHAPES)
    entry, wanted = entry_of(shape, data.draw(grids(shape))), data.draw(boxes(shape))
    counted = np.zeros(shape, int)
    for item in read_items("w", entry, wanted):
        assert item.region & item.chunk.region == item.region
        counted[item.region.slices()] += 1
    expected = np.zeros(shape, int)
    expected[wanted.slices()] = 1
    assert np.array_equal(counted, expected)


@given(st.data())
def test_a_missing_or_doubled_chunk_is_damage_if_it_is_wanted(
    data: st.DataObject,
) -> None:
    """G6. Method: any grid with one cell left out or doubled; an error that names the tensor if and
    only if the cell is wanted."""
    shape = data.draw(SHAPES)
    cells, wanted = data.draw(grids(shape)), data.draw(boxes(shape))
    victim = data.draw(st.integers(0, len(cells) - 1))
    broken = data.draw(
        st.sampled_from([cells[:victim] + cells[victim + 1 :], [*cells, cells[victim]]])
    )
    if (cells[victim] & wanted).num_elements:
        with pytest.raises(DamagedError, match="`w`"):
            read_items("w", entry_of(shape, broken), wanted)
    else:
        read_items("w", entry_of(shape, broken), wanted)
