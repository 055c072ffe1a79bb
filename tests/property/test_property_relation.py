"""Relations map any box in both directions, compared with arithmetic on single elements."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from holdfast.format.region import Region
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.relation import Axes, Dim, Relation, Side, SideName

Tensors = dict[str, NDArray[np.int64]]
Place = tuple[str, tuple[int, ...]]


@st.composite
def relations(draw: st.DrawFn) -> tuple[Relation, Axes]:
    """Draw a relation of up to five axes; each side has its own dims, names and segments."""
    names = "abcde"[: draw(st.integers(1, 5))]
    axes = {name: range(1, 1 + draw(st.integers(1, 4))) for name in names}
    axes["z"] = range(draw(st.integers(1, 3)))
    return Relation(draw(sides(names, axes, "native")), draw(sides(names, axes, "hf"))), axes


@st.composite
def sides(draw: st.DrawFn, names: str, axes: Axes, prefix: str) -> Side:
    """Draw a side: axes in any order, some in the name, the others merged into dims."""
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
    """Compute the tensor and the position of one element from its indices."""
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
def test_every_box_is_mapped_correctly_in_both_directions(
    related: tuple[Relation, Axes], data: st.DataObject
) -> None:
    """G6. Method: both sides hold the number of each element, at a position computed by arithmetic.
    A box filled from the other side has the same numbers, and other segments stay untouched."""
    relation, axes = related
    words = {axis: range(len(axes[axis])) for axis in relation.words}
    known = {**axes, **words}
    mapping = TensorMapping([relation], known)
    sides: dict[SideName, Side] = {"native": relation.native, "hf": relation.hf}
    held: dict[SideName, Tensors] = {
        side: {n: np.full(mapping.shape(side, n), -1, np.int64) for n in mapping.names(side)}
        for side in sides
    }
    letters = [axis for axis in axes if axis != "z"]
    for number, at in enumerate(product(*(range(len(axes[axis])) for axis in letters))):
        for side, one in sides.items():
            name, position = place_of(one, known, dict(zip(letters, at, strict=True)))
            held[side][name][position] = number
    for side, other in (("native", "hf"), ("hf", "native")):
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
def test_writing_back_a_box_changes_its_elements_only(
    related: tuple[Relation, Axes], data: st.DataObject
) -> None:
    """Method: an export writes a box of a native tensor into Hugging Face tensors of zeros; their
    nonzero elements are then those of the box."""
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
    hf = {n: np.zeros(mapping.shape("hf", n), np.int64) for n in mapping.names("hf")}
    marked = np.arange(1, Region.whole(shape).num_elements + 1).reshape(shape)
    for copy in mapping.copies("native", name, box):
        there = hf[copy.source][copy.source_view.region.slices()]
        copy.run_back(there, marked[box.slices()][copy.target_view.region.slices()])
    written = np.concatenate([tensor[tensor > 0] for tensor in hf.values()])
    own = np.zeros(shape, bool)
    own[tuple(slice(*dim.bounds(known)) for dim in relation.native.dims)] = True
    assert sorted(written.tolist()) == marked[box.slices()][own[box.slices()]].tolist()
