"""Sets of named tensors that are read by boxes, and wrappers that rename or map them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from holdfast.format.dtypes import dtype_of
from holdfast.format.region import Region
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.numbers import Array, box_of, convert, raw_type
from holdfast.tensors.relation import SideName


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype and shape of a tensor that has not been read."""

    dtype: str
    """Dtype of the elements that `read` returns."""

    shape: tuple[int, ...]

    preferred: str = ""
    """Dtype to write the tensor in unless the user requests another; empty: `dtype`."""

    fixed: bool = False
    """Whether the tensor is written in `write_dtype` even if the user requests another dtype."""

    @property
    def write_dtype(self) -> str:
        """Dtype to write the tensor in unless the user requests another."""
        return self.preferred or self.dtype


class Tensors(Protocol):
    """Set of named tensors. Any box of a tensor can be read."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor, in the order in which reading them is cheapest."""
        ...

    def read(self, name: str, region: Region) -> Array:
        """Read a box of a tensor. The result has the box's shape; it may be a strided view.

        Raises:
            DamagedError: the stored bytes are not the ones that were written.
        """
        ...


class Renamed:
    """Tensors under other names. Tensors without a new name are left out."""

    def __init__(
        self,
        source: Tensors,
        names: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """`names`: new name of each tensor of the source. `aliases`: further new names of tensors;
        each maps to the new name of its tensor in `names`."""
        self._source = source
        self._original = {new: old for old, new in names.items()}
        for name, first in (aliases or {}).items():
            if first in self._original:
                self._original[name] = self._original[first]
        self.infos: dict[str, TensorInfo] = {
            new: source.infos[old] for new, old in self._original.items()
        }

    def read(self, name: str, region: Region) -> Array:
        return self._source.read(self._original[name], region)


class Mapped:
    """Native tensors that a mapping computes from Hugging Face tensors, or the reverse."""

    def __init__(self, source: Tensors, mapping: TensorMapping, side: SideName) -> None:
        """`side`: whether this object has native or Hugging Face tensors. `source` has the other
        ones."""
        self._source, self._mapping, self._side = source, mapping, side
        self.infos: dict[str, TensorInfo] = {name: self._info(name) for name in mapping.names(side)}

    def read(self, name: str, region: Region) -> Array:
        dtype = self.infos[name].dtype
        copies = list(self._mapping.copies(self._side, name, region))
        single = len(copies) == 1 and copies[0].target_view.exact
        target = np.empty(() if single else region.shape, raw_type(dtype))
        for copy in copies:
            elements = self._source.read(copy.source, copy.source_view.region)
            elements = convert(elements, self._source.infos[copy.source].dtype, dtype)
            if single:
                return copy.as_target(elements)
            copy.run(elements, box_of(target, copy.target_view.region))
        return target

    def _info(self, name: str) -> TensorInfo:
        """Return dtypes and shape of a computed tensor. Its dtype is the widest dtype of the source
        tensors that it is computed from."""
        shape = self._mapping.shape(self._side, name)
        copies = self._mapping.copies(self._side, name, Region.whole(shape))
        sources = [self._source.infos[source] for source in {copy.source: None for copy in copies}]
        dtype = _widest([source.dtype for source in sources])
        write_dtype = _widest([source.write_dtype for source in sources])
        fixed = self._mapping.dtype(self._side, name)
        return TensorInfo(dtype, shape, fixed or write_dtype, fixed is not None)


def _widest(dtypes: Sequence[str]) -> str:
    return max(dtypes, key=lambda dtype: dtype_of(dtype).itemsize)


class Zeros:
    """Float32 tensors that are all zeros."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.infos: dict[str, TensorInfo] = {
            name: TensorInfo("float32", shape, fixed=True) for name, shape in shapes.items()
        }

    def read(self, _: str, region: Region) -> Array:
        return np.zeros(region.shape, np.float32)


class Joined:
    """Tensors of two sets that have no name in common."""

    def __init__(self, first: Tensors, second: Tensors) -> None:
        self._first, self._second = first, second
        self.infos: dict[str, TensorInfo] = {**first.infos, **second.infos}

    def read(self, name: str, region: Region) -> Array:
        return (self._first if name in self._first.infos else self._second).read(name, region)


def only(source: Tensors, names: Sequence[str]) -> Renamed:
    """Return the tensors of `source` with these names."""
    return Renamed(source, {name: name for name in names})
