"""Which boxes of source tensors fill a box of a target tensor: relations with all sizes known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from holdfast.format.region import Region
from holdfast.tensors.relation import Alias, Axes, Dim, Relation, Side, size_of

SideName = Literal["native", "hub"]

READS_MAX = 64
"""A box that is not one stretch of a merged dim is read in this many boxes, or with what lies
between."""

Box = dict[str, tuple[int, int]]
"""Half-open run of indices along each axis."""


@dataclass(frozen=True, slots=True)
class View:
    """A box of a tensor, seen along the axes that make up its dims."""

    region: Region
    """Of the tensor: what is read or written."""

    axes: tuple[str, ...]
    """One a dim of `factored`."""

    factored: tuple[int, ...]
    """Shape of `region` with every merged dim taken apart."""

    inside: tuple[slice, ...]
    """The box within it: all of it, unless `region` covers more."""

    def of(self, region_data: NDArray[np.generic]) -> NDArray[np.generic]:
        """The box, by axes; shares memory with `region_data`, which has the shape of `region`."""
        seen = region_data.reshape(self.factored)
        return seen[self.inside] if self.inside else seen

    @property
    def exact(self) -> bool:
        """Whether `region` holds the box and nothing else."""
        return tuple(s.stop - s.start for s in self.inside) == self.factored


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of one source tensor, and where they go in the target."""

    source: str
    source_view: View
    target: str
    target_view: View

    def run(self, source: NDArray[np.generic], target: NDArray[np.generic]) -> None:
        """Move the elements. `source` and `target` have the shapes of the two regions, and the
        same dtype."""
        place = self.target_view.of(target)
        place[...] = self._taken(source).reshape(place.shape)

    def run_back(self, source: NDArray[np.generic], target: NDArray[np.generic]) -> None:
        """Move the elements from the target to the source."""
        taken = self._taken(source)
        taken[...] = self.target_view.of(target).reshape(taken.shape)

    def alone(self, source: NDArray[np.generic]) -> NDArray[np.generic]:
        """What `run` would fill the target region with, where it fills all of it: a view of
        `source` if it can be one."""
        return self._taken(source).reshape(self.target_view.region.shape)

    def _taken(self, source: NDArray[np.generic]) -> NDArray[np.generic]:
        """The elements in the order of the target's axes."""
        ours, theirs = self.source_view.axes, self.target_view.axes
        # An axis on one side alone chooses between tensors on the other: one index of it is here.
        gone = tuple(n for n, axis in enumerate(ours) if axis not in theirs)
        left = [axis for axis in ours if axis in theirs]
        order = [left.index(axis) for axis in theirs if axis in left]
        return self.source_view.of(source).squeeze(gone).transpose(order)


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor in one relation, at its position along the axes of the name."""

    relation: Relation
    axes: Axes
    indices: Mapping[str, int]


class TensorMapping:
    """Relations whose sizes are known: names, shapes, and what fills what, in both directions."""

    def __init__(
        self, relations: Sequence[Relation], axes: Axes, aliases: Sequence[Alias] = ()
    ) -> None:
        """`axes` has every axis that is not spelled by words."""
        self.axes = axes
        self._places: dict[SideName, dict[str, list[_Place]]] = {"native": {}, "hub": {}}
        self.aliases: dict[SideName, dict[str, str]] = {
            "native": {alias.native: alias.native_of for alias in aliases},
            "hub": {alias.hub: alias.hub_of for alias in aliases},
        }
        """Second names of tensors, with the first."""
        for relation in relations:
            words = {axis: range(len(spelled)) for axis, spelled in relation.words.items()}
            known = {**axes, **words}
            for name, side in _sides(relation):
                for tensor, indices in side.names(known):
                    place = _Place(relation, known, indices)
                    self._places[name].setdefault(tensor, []).append(place)

    def names(self, side: SideName) -> list[str]:
        """Of all tensors on a side, in the order of the relations; second names are left out."""
        return list(self._places[side])

    def shape(self, side: SideName, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        place = self._places[side][name][0]
        return _side(place.relation, side).shape(place.axes)

    def dtype(self, side: SideName, name: str) -> str | None:
        """What a tensor stays in, whatever the others are converted to; None: no such rule."""
        return self._places[side][name][0].relation.dtype

    def alone(self, side: SideName, name: str) -> Relation | None:
        """The relation of a tensor that is one tensor on the other side too, whole, with the same
        elements in each row, if perhaps in another order of rows. Both names are spelled out; None:
        there is no such tensor, or it is not so."""
        places = self._places[side].get(name, ())
        if len(places) != 1:
            return None
        relation, axes, indices = places[0].relation, places[0].axes, places[0].indices
        ours, theirs = relation.native, relation.hub
        same_rows = [sorted(side.dims[0].axes) for side in relation.sides]
        if (
            {*ours.name_axes} != {*theirs.name_axes}
            or any(len(dim.segments) > 1 for side in relation.sides for dim in side.dims)
            or same_rows[0] != same_rows[1]
            or ours.dims[1:] != theirs.dims[1:]
        ):
            return None
        native, hub = (Side(s.spelled(indices, axes), s.dims) for s in relation.sides)
        return Relation(native, hub, relation.dtype)

    def sources(self, side: SideName, name: str) -> list[str]:
        """Tensors of the other side that hold the elements of this one."""
        whole = Region.whole(self.shape(side, name))
        return list(dict.fromkeys(copy.source for copy in self.copies(side, name, whole)))

    def copies(
        self, side: SideName, name: str, wanted: Region, *, exact: bool = False
    ) -> Iterator[Copy]:
        """What fills the box `wanted` of a tensor, every element once.

        The target regions of the copies are counted from the first element of `wanted`. `exact`: no
        source region has elements beside those that are copied, however many copies that takes.
        """
        for place in self._places[side][name]:
            target, source = _side(place.relation, side), _side(place.relation, _other(side))
            for box in _boxes_in(target, place.axes, wanted):
                for full in _with_name_axes(source, {**box, **_single(place.indices)}):
                    at = {axis: full[axis][0] for axis in source.name_axes}
                    spelled = source.spelled(at, place.axes)
                    for part in _stretches(source, target, place.axes, full, exact):
                        view = _view(target, place.axes, part)
                        within = View(_from(view.region, wanted), *_seen(view))
                        yield Copy(spelled, _view(source, place.axes, part), name, within)


def _seen(view: View) -> tuple[tuple[str, ...], tuple[int, ...], tuple[slice, ...]]:
    return view.axes, view.factored, view.inside


def _from(region: Region, origin: Region) -> Region:
    """`region`, counted from the first element of `origin`."""
    return region.within(Region(origin.start, tuple(map(max, origin.start, region.stop))))


def _sides(relation: Relation) -> tuple[tuple[SideName, Side], tuple[SideName, Side]]:
    return ("native", relation.native), ("hub", relation.hub)


def _side(relation: Relation, side: SideName) -> Side:
    return relation.native if side == "native" else relation.hub


def _other(side: SideName) -> SideName:
    return "hub" if side == "native" else "native"


def _single(indices: Mapping[str, int]) -> Box:
    return {axis: (index, index + 1) for axis, index in indices.items()}


def _boxes_in(side: Side, axes: Axes, wanted: Region) -> Iterator[Box]:
    """The elements of `wanted` that the relation is about, as boxes along its axes."""
    for found in product(
        *(_dim_boxes(*d, axes) for d in zip(side.dims, wanted.start, wanted.stop, strict=True))
    ):
        yield {axis: run for box in found for axis, run in box.items()}


def _dim_boxes(dim: Dim, start: int, stop: int, axes: Axes) -> list[Box]:
    first, last = dim.bounds(axes)
    lo, hi = max(start, first) - first, min(stop, last) - first
    return _boxes(lo, hi, dim.axes, axes) if lo < hi else []


def _boxes(lo: int, hi: int, merged: Sequence[str], axes: Axes) -> list[Box]:
    """Elements `lo` to `hi` along merged axes, as boxes that each lie in one stretch."""
    if not merged:
        return [{}]
    axis, *rest = merged
    if not rest:
        return [{axis: (lo, hi)}]
    inner = size_of(rest, axes)
    (first, skipped), (last, over) = divmod(lo, inner), divmod(hi, inner)
    if first == last:
        return [{axis: (first, first + 1), **box} for box in _boxes(skipped, over, rest, axes)]
    found: list[Box] = []
    if skipped:
        found += [{axis: (first, first + 1), **b} for b in _boxes(skipped, inner, rest, axes)]
        first += 1
    if first < last:
        found.append({axis: (first, last), **{a: (0, len(axes[a])) for a in rest}})
    if over:
        found += [{axis: (last, last + 1), **b} for b in _boxes(0, over, rest, axes)]
    return found


def _with_name_axes(source: Side, box: Box) -> Iterator[Box]:
    """The box once for each source tensor that it reaches into."""
    for at in product(*(range(*box[axis]) for axis in source.name_axes)):
        yield {**box, **_single(dict(zip(source.name_axes, at, strict=True)))}


def _stretches(source: Side, target: Side, axes: Axes, box: Box, exact: bool) -> Iterator[Box]:
    """The box in pieces that are one stretch of each merged dim on both sides, as long as there are
    not too many of them."""
    dims = (*source.dims, *target.dims)
    loose = list(dict.fromkeys(axis for dim in dims for axis in _loose(dim, axes, box)))
    if not exact and prod(box[axis][1] - box[axis][0] for axis in loose) > READS_MAX:
        yield box
        return
    for at in product(*(range(*box[axis]) for axis in loose)):
        yield {**box, **_single(dict(zip(loose, at, strict=True)))}


def _loose(dim: Dim, axes: Axes, box: Box) -> Iterator[str]:
    """Axes along which the box has gaps in the merged dim: an inner axis is not there in full."""
    partial = False
    for axis in reversed(dim.axes):
        start, stop = box[axis]
        if partial and stop - start > 1:
            yield axis
        partial = partial or stop - start < len(axes[axis])


def _view(side: Side, axes: Axes, box: Box) -> View:
    """The smallest region of a tensor that holds the box, and how the box lies in it."""
    start, stop = [], []
    named: list[str] = []
    factored: list[int] = []
    inside: list[slice] = []
    for dim in side.dims:
        merged = list(dim.axes)
        base, _ = dim.bounds(axes)
        # Outer axes of which one index is wanted only shift the region.
        while len(merged) > 1 and box[merged[0]][1] - box[merged[0]][0] == 1:
            base += box[merged[0]][0] * size_of(merged[1:], axes)
            named.append(merged.pop(0))
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
        named += merged
        factored += [hi - lo, *(len(axes[axis]) for axis in rest)]
        inside += [slice(0, hi - lo), *(slice(*box[axis]) for axis in rest)]
    return View(Region(tuple(start), tuple(stop)), tuple(named), tuple(factored), tuple(inside))
