"""Mappings: relations with known sizes, and the copies that fill a box of a target tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from holdfast.format.region import Region
from holdfast.tensors.relation import Axes, Dim, Relation, Side, SideName, size_of

READS_MAX = 64
"""Most reads that a box with gaps is split into. If more are needed, a single read includes the
gaps."""

Box = dict[str, tuple[int, int]]
"""Half-open range of indices along each axis."""


@dataclass(frozen=True, slots=True)
class View:
    """A box of a tensor. A dim that merges several axes, such as heads and the elements of a head,
    is split into these axes."""

    region: Region
    """Region of the tensor that is read or written: the smallest that includes the box."""

    axes: tuple[str, ...]
    """One axis per dim of `factored`."""

    factored: tuple[int, ...]
    """Shape of `region` with every merged dim split into its axes."""

    inside: tuple[slice, ...]
    """Slices of `factored` that select the box. If `region` includes gaps, they select only a
    part."""

    def of(self, region_data: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return the box, one dim per axis, as a view of `region_data` (the region's elements)."""
        by_axes = region_data.reshape(self.factored)
        return by_axes[self.inside] if self.inside else by_axes

    @property
    def exact(self) -> bool:
        """Whether `region` has no elements besides those of the box."""
        return tuple(s.stop - s.start for s in self.inside) == self.factored


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of one source tensor, and their position in the target tensor.

    Arrays passed to the methods have the shapes of the two views' regions, and the same dtype.
    """

    source: str
    source_view: View
    target_view: View

    def run(self, source: NDArray[np.generic], target: NDArray[np.generic]) -> None:
        """Copy the elements from the source region to the target region."""
        box = self.target_view.of(target)
        box[...] = self._in_target_order(source).reshape(box.shape)

    def run_back(self, source: NDArray[np.generic], target: NDArray[np.generic]) -> None:
        """Copy the elements from the target region to the source region."""
        box = self._in_target_order(source)
        box[...] = self.target_view.of(target).reshape(box.shape)

    def as_target(self, source: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return the elements in the shape of the target region, as a view where possible.

        Only for a copy that fills the whole target region (`target_view.exact`).
        """
        return self._in_target_order(source).reshape(self.target_view.region.shape)

    def _in_target_order(self, source: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return a view of the source box with its dims in the order of the target's axes."""
        source_axes, target_axes = self.source_view.axes, self.target_view.axes
        # If only one side has an axis as a dim, the other side has it in its tensor names, such as
        # the number of a layer. The box covers a single index of this axis, so the dim has length
        # 1.
        dropped = tuple(n for n, axis in enumerate(source_axes) if axis not in target_axes)
        common = [axis for axis in source_axes if axis in target_axes]
        order = [common.index(axis) for axis in target_axes if axis in common]
        return self.source_view.of(source).squeeze(dropped).transpose(order)


@dataclass(frozen=True, slots=True)
class _Member:
    """A relation that describes a tensor, and which of the tensors in the relation it is."""

    relation: Relation
    axes: Axes
    indices: Mapping[str, int]
    """Index of the tensor along each axis in its name, such as the number of its layer."""


class TensorMapping:
    """Relations of a model with known sizes: the names and shapes of its tensors on both sides, and
    the copies that compute tensors of one side from those of the other."""

    def __init__(
        self,
        relations: Sequence[Relation],
        axes: Axes,
        aliases: Mapping[SideName, Mapping[str, str]] | None = None,
    ) -> None:
        """`axes`: indices of every axis, except axes such as `{g:w1,w3}`, which a relation spells
        out. `aliases`: first name of each tied tensor, by its second name."""
        self.axes: Axes = axes
        self.aliases: Mapping[SideName, Mapping[str, str]] = aliases or {"native": {}, "hf": {}}
        self._members: dict[SideName, dict[str, list[_Member]]] = {"native": {}, "hf": {}}
        for relation in relations:
            words = {axis: range(len(spelled)) for axis, spelled in relation.words.items()}
            known = {**axes, **words}
            for side, members in self._members.items():
                for tensor, indices in relation.side(side).names(known):
                    member = _Member(relation, known, indices)
                    members.setdefault(tensor, []).append(member)

    def names(self, side: SideName) -> list[str]:
        """Return one name per tensor of a side, in the order of the relations. If a tensor has
        several names, this is the first."""
        return list(self._members[side])

    def shape(self, side: SideName, name: str) -> tuple[int, ...]:
        member = self._members[side][name][0]
        return member.relation.side(side).shape(member.axes)

    def dtype(self, side: SideName, name: str) -> str | None:
        """Return the dtype that a tensor keeps in every conversion; None if it is converted like
        others."""
        return self._members[side][name][0].relation.dtype

    def row_by_row(self, side: SideName, name: str) -> Relation | None:
        """Return the relation between tensor `name` of a side and the tensor of the other side that
        has the same slices along dim 0, in any order; None if there is no such tensor.

        The returned relation has complete tensor names, without fields such as `{l}`.
        """
        members = self._members[side].get(name, ())
        if len(members) != 1:
            return None
        relation, axes, indices = members[0].relation, members[0].axes, members[0].indices
        native, hf = relation.sides
        if (
            {*native.name_axes} != {*hf.name_axes}
            or any(len(dim.segments) > 1 for one in relation.sides for dim in one.dims)
            or sorted(native.dims[0].axes) != sorted(hf.dims[0].axes)
            or native.dims[1:] != hf.dims[1:]
        ):
            return None
        native, hf = (Side(one.spelled(indices, axes), one.dims) for one in relation.sides)
        return Relation(native, hf, relation.dtype)

    def copies(
        self, side: SideName, name: str, wanted: Region, *, exact: bool = False
    ) -> Iterator[Copy]:
        """Yield the copies that fill the box `wanted` of a tensor, each element once.

        Target regions are relative to the first element of `wanted`. `exact`: whether no
        region may include other elements than those to copy, however many copies this takes.
        """
        other: SideName = "hf" if side == "native" else "native"
        for member in self._members[side][name]:
            axes = member.axes
            target, source = member.relation.side(side), member.relation.side(other)
            for target_box in _boxes_in(target, axes, wanted):
                target_box |= _single(member.indices)
                for box in _split(target_box, source.name_axes):
                    indices = {axis: box[axis][0] for axis in source.name_axes}
                    source_name = source.spelled(indices, axes)
                    for part in _without_gaps(source, target, axes, box, exact):
                        view = _view(target, axes, part)
                        region = view.region.within(wanted)
                        target_view = View(region, view.axes, view.factored, view.inside)
                        yield Copy(source_name, _view(source, axes, part), target_view)


def _single(indices: Mapping[str, int]) -> Box:
    return {axis: (index, index + 1) for axis, index in indices.items()}


def _boxes_in(side: Side, axes: Axes, wanted: Region) -> Iterator[Box]:
    """Yield the elements of `wanted` that a relation describes, as boxes along the relation's
    axes."""
    for boxes in product(
        *(_dim_boxes(*d, axes) for d in zip(side.dims, wanted.start, wanted.stop, strict=True))
    ):
        yield {axis: bounds for box in boxes for axis, bounds in box.items()}


def _dim_boxes(dim: Dim, start: int, stop: int, axes: Axes) -> list[Box]:
    first, last = dim.bounds(axes)
    lo, hi = max(start, first) - first, min(stop, last) - first
    return _boxes(lo, hi, dim.axes, axes) if lo < hi else []


def _boxes(lo: int, hi: int, merged: Sequence[str], axes: Axes) -> list[Box]:
    """Divide elements `lo` to `hi` of a dim into boxes along its axes. `merged`: axes that the dim
    merges, outermost first."""
    if not merged:
        return [{}]
    axis, *rest = merged
    inner = size_of(rest, axes)
    (first, skipped), (last, over) = divmod(lo, inner), divmod(hi, inner)
    if first == last:
        return [{axis: (first, first + 1), **box} for box in _boxes(skipped, over, rest, axes)]
    boxes: list[Box] = []
    if skipped:
        boxes += [{axis: (first, first + 1), **b} for b in _boxes(skipped, inner, rest, axes)]
        first += 1
    if first < last:
        boxes.append({axis: (first, last), **{a: (0, len(axes[a])) for a in rest}})
    if over:
        boxes += [{axis: (last, last + 1), **b} for b in _boxes(0, over, rest, axes)]
    return boxes


def _split(box: Box, axes: Sequence[str]) -> Iterator[Box]:
    """Split a box into boxes with a single index along each of `axes`."""
    for indices in product(*(range(*box[axis]) for axis in axes)):
        yield {**box, **_single(dict(zip(axes, indices, strict=True)))}


def _without_gaps(source: Side, target: Side, axes: Axes, box: Box, exact: bool) -> Iterator[Box]:
    """Split a box. Where a side stores several axes as one dim, each part is one range of this dim.

    If there would be more than `READS_MAX` parts, yield the box unsplit, unless `exact`.
    """
    dims = (*source.dims, *target.dims)
    gapped = list(dict.fromkeys(axis for dim in dims for axis in _axes_with_gaps(dim, axes, box)))
    if not exact and prod(box[axis][1] - box[axis][0] for axis in gapped) > READS_MAX:
        yield box
    else:
        yield from _split(box, gapped)


def _axes_with_gaps(dim: Dim, axes: Axes, box: Box) -> Iterator[str]:
    """Yield each axis of `dim` along which the box has gaps in the tensor: it has several indices
    along this axis, but only some of the indices along an axis further inside."""
    partial = False
    for axis in reversed(dim.axes):
        start, stop = box[axis]
        if partial and stop - start > 1:
            yield axis
        partial = partial or stop - start < len(axes[axis])


def _view(side: Side, axes: Axes, box: Box) -> View:
    """Return the view of a box in the tensor of one side. The box is given along the axes of a
    relation."""
    start, stop = [], []
    view_axes: list[str] = []
    factored: list[int] = []
    inside: list[slice] = []
    for dim in side.dims:
        merged = list(dim.axes)
        base, _ = dim.bounds(axes)
        # Outer axes with a single index only shift the region.
        while len(merged) > 1 and box[merged[0]][1] - box[merged[0]][0] == 1:
            base += box[merged[0]][0] * size_of(merged[1:], axes)
            view_axes.append(merged.pop(0))
            factored.append(1)
            inside.append(slice(0, 1))
        if not merged:
            start.append(base)
            stop.append(base + 1)
            continue
        first, *rest = merged
        lo, hi = box[first]
        inner = size_of(rest, axes)
        start.append(base + lo * inner)
        stop.append(base + hi * inner)
        view_axes += merged
        factored += [hi - lo, *(len(axes[axis]) for axis in rest)]
        inside += [slice(0, hi - lo), *(slice(*box[axis]) for axis in rest)]
    region = Region(tuple(start), tuple(stop))
    return View(region, tuple(view_axes), tuple(factored), tuple(inside))
