"""Relations between tensors: any box in either direction, against single elements."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from holdfast.format.region import Region
from holdfast.tensors.mapping import SideName, TensorMapping
from holdfast.tensors.relation import Axes, Dim, Relation, Side

Tensors = dict[str, NDArray[np.int64]]
Place = tuple[str, tuple[int, ...]]


@st.composite
def relations(draw: st.DrawFn) -> tuple[Relation, Axes]:
    """Up to five axes, in different dims and names on each side, some dims in segments."""
    names = "abcde"[: draw(st.integers(1, 5))]
    axes = {name: range(1, 1 + draw(st.integers(1, 4))) for name in names}
    axes["z"] = range(draw(st.integers(1, 3)))
    return Relation(draw(sides(names, axes, "native")), draw(sides(names, axes, "hub"))), axes


@st.composite
def sides(draw: st.DrawFn, names: str, axes: Axes, prefix: str) -> Side:
    """The axes in any order: some in the name, the others merged into dims."""
    order = draw(st.permutations(list(names)))
    in_name = order[: draw(st.integers(0, len(order) - 1))]
    rest = order[len(in_name) :]
    cuts = sorted(draw(st.sets(st.integers(1, len(rest)), max_size=2)) | {0, len(rest)})
    dims = []
    for start, stop in pairwise(cuts):
        own = tuple(rest[start:stop])
        before, after = draw(st.integers(0, 1)), draw(st.integers(0, 1))
        dims.append(Dim((*[("z",)] * before, own, *[("z",)] * after), before))
    words = tuple(
        (axis, tuple(f"word{n}" for n in range(len(axes[axis]))))
        for axis in in_name
        if draw(st.booleans())
    )
    name = ".".join([prefix, *(f"{{{axis}}}" for axis in in_name)])
    return Side(name, tuple(dims), words)


def place_of(side: Side, axes: Axes, at: dict[str, int]) -> Place:
    """Position of one element, computed from its indices alone."""
    position = []
    for dim in side.dims:
        flat = 0
        for axis in dim.axes:
            flat = flat * len(axes[axis]) + at[axis]
        before = 0
        for segment in dim.segments[: dim.own]:
            before += int(np.prod([len(axes[axis]) for axis in segment]))
        position.append(before + flat)
    return side.spelled(at, axes), tuple(position)


def filled(mapping: TensorMapping, side: SideName, name: str, box: Region, by: Tensors) -> object:
    target = np.full(box.shape, -1, np.int64)
    for copy in mapping.copies(side, name, box):
        source = by[copy.source][copy.source_view.region.slices()]
        copy.run(source, target[copy.target_view.region.slices()])
    return target.tolist()


@given(relations(), st.data())
def test_a_relation_its_inverse_and_every_box_of_it_agree(
    related: tuple[Relation, Axes], data: st.DataObject
) -> None:
    """G6. Method: each element is numbered and placed by arithmetic on both sides; boxes of each
    side, filled from the other, hold exactly these numbers. Elements of other segments are
    unchanged."""
    relation, axes = related
    words = {axis: range(len(axes[axis])) for axis in relation.words}
    known = {**axes, **words}
    mapping = TensorMapping([relation], known)
    sides: dict[SideName, Side] = {"native": relation.native, "hub": relation.hub}
    held: dict[SideName, Tensors] = {
        side: {n: np.full(mapping.shape(side, n), -1, np.int64) for n in mapping.names(side)}
        for side in sides
    }
    letters = [axis for axis in axes if axis != "z"]
    for number, at in enumerate(product(*(range(len(axes[axis])) for axis in letters))):
        for side, one in sides.items():
            name, position = place_of(one, known, dict(zip(letters, at, strict=True)))
            held[side][name][position] = number
    for side, other in (("native", "hub"), ("hub", "native")):
        name = data.draw(st.sampled_from(mapping.names(side)))
        whole = held[side][name]
        start = tuple(data.draw(st.integers(0, size - 1)) for size in whole.shape)
        stop = tuple(
            data.draw(st.integers(first, size))
            for first, size in zip(start, whole.shape, strict=True)
        )
        box = Region(start, stop)
        found = filled(mapping, side, name, box, held[other])  # type: ignore[index]
        assert found == whole[box.slices()].tolist()


@given(relations(), st.data())
def test_a_box_written_back_changes_exactly_its_elements(
    related: tuple[Relation, Axes], data: st.DataObject
) -> None:
    """Method: an export writes a box of a tensor of ours to its position in Hugging Face's; the
    same numbers change nothing, and other numbers change as many elements as the box has."""
    relation, axes = related
    known = {**axes, **{axis: range(len(axes[axis])) for axis in relation.words}}
    mapping = TensorMapping([relation], known)
    name = data.draw(st.sampled_from(mapping.names("native")))
    shape = mapping.shape("native", name)
    start = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    stop = tuple(
        data.draw(st.integers(first, size)) for first, size in zip(start, shape, strict=True)
    )
    box = Region(start, stop)
    hub = {n: np.zeros(mapping.shape("hub", n), np.int64) for n in mapping.names("hub")}
    marked = np.arange(1, Region.whole(shape).num_elements + 1).reshape(shape)
    for copy in mapping.copies("native", name, box):
        there = hub[copy.source][copy.source_view.region.slices()]
        copy.run_back(there, marked[box.slices()][copy.target_view.region.slices()])
    written = np.concatenate([tensor[tensor > 0] for tensor in hub.values()])
    own = np.zeros(shape, bool)
    own[tuple(slice(*dim.bounds(known)) for dim in relation.native.dims)] = True
    assert sorted(written.tolist()) == marked[box.slices()][own[box.slices()]].tolist()
