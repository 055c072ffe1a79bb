"""Tensors that are read by boxes, and one set of them seen as another: renamed, mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from holdfast.format.dtypes import dtype_of
from holdfast.format.region import Region
from holdfast.tensors.mapping import SideName, TensorMapping
from holdfast.tensors.numbers import Array, box_of, convert, raw_type


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: str
    """Of the elements that `read` gives."""

    shape: tuple[int, ...]

    kept: str = ""
    """What to store it in where nothing else is asked for; empty: `dtype`."""

    fixed: bool = False
    """Whether it is stored so whatever is asked for."""

    @property
    def stored(self) -> str:
        return self.kept or self.dtype


class Tensors(Protocol):
    """Named tensors, of which any box can be read."""

    @property
    def held(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, in the order in which reading them is cheapest."""
        ...

    def read(self, name: str, region: Region) -> Array:
        """The elements of a box, in its shape. They may be a view, of any strides.

        Raises:
            DamagedError: they are not those that were written.
        """
        ...


class Renamed:
    """Tensors under other names; those without one are left out."""

    def __init__(
        self,
        source: Tensors,
        names: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """`names`: of each tensor of the source, what it is called here; `aliases`: second names,
        with the first."""
        self._source = source
        self._original = {ours: theirs for theirs, ours in names.items()}
        for name, first in (aliases or {}).items():
            if first in self._original:
                self._original[name] = self._original[first]
        self.held = {ours: source.held[theirs] for ours, theirs in self._original.items()}

    def read(self, name: str, region: Region) -> Array:
        return self._source.read(self._original[name], region)


class Mapped:
    """The tensors of one side of a mapping, read from those of the other."""

    def __init__(self, source: Tensors, mapping: TensorMapping, side: SideName) -> None:
        """`side` is the one that is seen here."""
        self._source, self._mapping, self._side = source, mapping, side
        self.held = {name: self._held(name) for name in mapping.names(side)}

    def read(self, name: str, region: Region) -> Array:
        wanted = self.held[name].dtype
        copies = list(self._mapping.copies(self._side, name, region))
        whole = len(copies) == 1 and copies[0].target_view.exact
        target = np.empty(() if whole else region.shape, raw_type(wanted))
        for copy in copies:
            found = self._source.read(copy.source, copy.source_view.region)
            found = convert(found, self._source.held[copy.source].dtype, wanted)
            if whole:
                return copy.alone(found)
            copy.run(found, box_of(target, copy.target_view.region))
        return target

    def _held(self, name: str) -> TensorInfo:
        """Where sources differ in dtype, the widest of them."""
        sources = [self._source.held[s] for s in self._mapping.sources(self._side, name)]
        widest = max(sources, key=lambda held: dtype_of(held.dtype).itemsize)
        kept = max((held.stored for held in sources), key=lambda dtype: dtype_of(dtype).itemsize)
        stays = self._mapping.dtype(self._side, name)
        shape = self._mapping.shape(self._side, name)
        return TensorInfo(widest.dtype, shape, stays or kept, stays is not None)


class Zeros:
    """Tensors in float32 that are all zeros."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.held = {
            name: TensorInfo("float32", shape, fixed=True) for name, shape in shapes.items()
        }

    def read(self, _: str, region: Region) -> Array:
        return np.zeros(region.shape, np.float32)


class Joined:
    """The tensors of two sets that have no name in common."""

    def __init__(self, first: Tensors, second: Tensors) -> None:
        self._first, self._second = first, second
        self.held = {**first.held, **second.held}

    def read(self, name: str, region: Region) -> Array:
        return (self._first if name in self._first.held else self._second).read(name, region)


def only(source: Tensors, names: Sequence[str]) -> Renamed:
    """These tensors alone."""
    return Renamed(source, {name: name for name in names})
