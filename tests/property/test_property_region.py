"""Regions, compared with sets of indices."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format.region import Region, first_overlap

Index = tuple[int, ...]


def elements(region: Region) -> set[Index]:
    """Yield every index in a region."""
    return set(product(*(range(s.start, s.stop) for s in region.slices())))


@st.composite
def regions(draw: st.DrawFn, ndim: int, size: int = 6) -> Region:
    bounds = [sorted(draw(st.tuples(*[st.integers(0, size)] * 2))) for _ in range(ndim)]
    return Region(tuple(b[0] for b in bounds), tuple(b[1] for b in bounds))


@st.composite
def several(draw: st.DrawFn, count_max: int) -> list[Region]:
    ndim = draw(st.integers(0, 3))
    return draw(st.lists(regions(ndim, 5), max_size=count_max))


pairs = st.integers(0, 3).flatmap(lambda ndim: st.tuples(regions(ndim), regions(ndim)))


@given(pairs)
def test_an_intersection_has_the_elements_of_both_regions(pair: tuple[Region, Region]) -> None:
    """Method: sets of indices; the intersection does not depend on the order."""
    a, b = pair
    assert elements(a & b) == elements(a) & elements(b)
    assert elements(a & b) == elements(b & a)
    assert a & a == a


@given(pairs)
def test_num_elements_and_shape_count_the_indices(pair: tuple[Region, Region]) -> None:
    """Method: counting the indices."""
    for region in pair:
        assert region.num_elements == len(elements(region))
        assert Region.whole(region.shape).num_elements == region.num_elements


@given(pairs)
def test_within_is_relative_to_the_start_of_the_outer_region(pair: tuple[Region, Region]) -> None:
    """Method: adding the outer region's start back to every index."""
    outer, other = pair
    inner = outer & other
    if inner.num_elements:
        moved = elements(inner.within(outer))
        assert {tuple(map(int.__add__, i, outer.start)) for i in moved} == elements(inner)
        assert inner.within(outer).fits(outer.shape)


@given(pairs)
def test_a_region_fits_if_all_its_elements_are_in_the_tensor(
    pair: tuple[Region, Region],
) -> None:
    """Method: containment of sets; no region is empty, so that none fits trivially."""
    region, shape = pair[0], pair[1].stop
    if region.num_elements:
        assert region.fits(shape) == (elements(region) <= elements(Region.whole(shape)))
    assert not region.fits((*shape, 9))


@given(several(count_max=8))
def test_first_overlap_finds_a_pair_exactly_if_two_regions_overlap(
    drawn: list[Region],
) -> None:
    """G6. Method: every pair by brute force; the pair that is found does overlap."""
    expected = any(elements(a) & elements(b) for i, a in enumerate(drawn) for b in drawn[i + 1 :])
    found = first_overlap(drawn)
    assert (found is not None) == expected
    if found:
        assert elements(found[0]) & elements(found[1])


def test_first_overlap_of_a_grid_finds_only_a_duplicated_cell() -> None:
    """G6. Method: a 6 by 6 grid of cells, then with each of them duplicated."""
    grid = [Region((i, j), (i + 1, j + 1)) for i in range(6) for j in range(6)]
    assert first_overlap(grid) is None
    for cell in grid:
        assert first_overlap([*grid, cell]) == (cell, cell)


@pytest.mark.parametrize(
    ("start", "stop"), [((-1,), (2,)), ((3,), (2,)), ((0, 0), (2,)), ((), (1,))]
)
def test_an_invalid_region_is_refused_by_the_constructor(start: Index, stop: Index) -> None:
    """Method: negative, reversed, and bounds of different lengths."""
    with pytest.raises(ValueError, match=r"need|start and stop"):
        Region(start, stop)
