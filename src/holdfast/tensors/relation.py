"""Relations: which elements of native tensors are which elements of Hugging Face tensors.

A relation describes two tensors by the same axes. It works in both directions, for whole tensors
and for any box of a tensor:

    attention.wq.weight       | (h r s) d | self_attn.q_proj.weight             | (h s r) d
    moe.experts.w1            | e f d     | mlp.experts.{e}.gate_proj.weight    | f d
    feed_forward.{g:w1,w3}    | f d       | mlp.gate_up_proj.weight             | (g f) d
    attention.wk.weight       | (k x) d   | self_attn.qkv_proj.weight | (h x)+*(k x)+(k x) d

The columns are the native name, the native dims, the Hugging Face name, and the Hugging Face dims
where they differ. A fifth column, if present, is a dtype that the tensor keeps in every conversion.

`(h r s)` is one dim that merges three axes, the first one outermost. `{e}` in a name: each index of
the axis `e` has its own tensor. `{g:w1,w3}`: in the names, the words `w1` and `w3` stand for the
indices of `g`. `a+*b+c` is a dim of three segments; the relation describes the segment with the
star. So rename, transpose, permute, stack, fuse and split are all relations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

SideName = Literal["native", "hf"]
"""Side of a relation: native names or Hugging Face names."""

Axes = Mapping[str, Sequence[int]]
"""Indices of each axis, as they appear in tensor names: most often `range(size)`."""

_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")
_GROUP = re.compile(r"\*?\([^)]*\)|\*?\w+")


@dataclass(frozen=True, slots=True)
class Dim:
    """One dim of a tensor: consecutive segments, each of merged axes."""

    segments: tuple[tuple[str, ...], ...]
    """Axes of each segment, outermost first. A segment without axes has one element."""

    own: int = 0
    """Index of the segment that the relation describes."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the segment that the relation describes."""
        return self.segments[self.own]

    def bounds(self, axes: Axes) -> tuple[int, int]:
        """Return the start and stop of the segment that the relation describes."""
        sizes = [size_of(segment, axes) for segment in self.segments]
        start = sum(sizes[: self.own])
        return start, start + sizes[self.own]

    def size(self, axes: Axes) -> int:
        """Return the number of elements along the dim, all segments included."""
        return sum(size_of(segment, axes) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two tensors that a relation connects, or one of the two groups of tensors."""

    name: str
    """Tensor name, with a `{axis}` field for each axis that selects one of several tensors."""

    dims: tuple[Dim, ...]

    words: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Pairs of an axis and the words that stand for its indices in the name."""

    @property
    def name_axes(self) -> tuple[str, ...]:
        """Axes whose index is part of the tensor's name, such as the number of the layer."""
        return tuple(match[1] for match in _FIELD.finditer(self.name))

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes in the name and the dims."""
        return *self.name_axes, *(axis for dim in self.dims for axis in dim.axes)

    def shape(self, axes: Axes) -> tuple[int, ...]:
        return tuple(dim.size(axes) for dim in self.dims)

    def spelled(self, indices: Mapping[str, int], axes: Axes) -> str:
        """Return the tensor name for these positions along the axes in the name."""
        words = dict(self.words)

        def spell(match: re.Match[str]) -> str:
            axis = match[1]
            if axis in words:
                return words[axis][indices[axis]]
            return str(axes[axis][indices[axis]])

        return _FIELD.sub(spell, self.name)

    def names(self, axes: Axes) -> list[tuple[str, dict[str, int]]]:
        """Return every tensor name, with its position along the axes in the name."""
        sizes = [range(len(axes[axis])) for axis in self.name_axes]
        positions = [dict(zip(self.name_axes, at, strict=True)) for at in product(*sizes)]
        return [(self.spelled(indices, axes), indices) for indices in positions]


@dataclass(frozen=True, slots=True)
class Relation:
    """Native tensors and Hugging Face tensors that hold the same elements."""

    native: Side
    hf: Side
    dtype: str | None = None
    """Dtype that the tensor keeps in every conversion; None: it is converted like the others."""

    def __post_init__(self) -> None:
        used = [sorted({*side.axes}) for side in self.sides]
        if used[0] != used[1] or any(len({*side.axes}) < len(side.axes) for side in self.sides):
            raise ValueError(f"both sides need the same axes, each once: {self}")

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.native, self.hf

    def side(self, name: SideName) -> Side:
        return self.native if name == "native" else self.hf

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """Words of each axis such as `{g:w1,w3}`, one word for each of its indices."""
        return {**dict(self.native.words), **dict(self.hf.words)}


def table(text: str, native: str = "", hf: str = "") -> tuple[Relation, ...]:
    """Parse a table of relations, one per line. `native` and `hf` are prefixes for the names of
    each side."""
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        cells = [cell.strip() for cell in line.split("|")]
        if not 3 <= len(cells) <= 5:
            raise ValueError(f"a relation has 3 to 5 columns: {line}")
        native_name, dims, hf_name = cells[:3]
        hf_dims = cells[3] if len(cells) > 3 and cells[3] else dims
        dtype = cells[4] if len(cells) > 4 else None
        rows.append(Relation(side(native + native_name, dims), side(hf + hf_name, hf_dims), dtype))
    return tuple(rows)


def side(name: str, dims: str) -> Side:
    """Parse one side of a relation from its two columns."""
    words = {m[1]: tuple(m[2].split(",")) for m in _FIELD.finditer(name) if m[2]}
    plain = _FIELD.sub(lambda match: f"{{{match[1]}}}", name)
    parsed = []
    for text in re.findall(r"(?:\*?\([^)]*\)|[^\s(])+", dims):
        groups = _GROUP.findall(text)
        starred = [n for n, group in enumerate(groups) if group.startswith("*")]
        segments = tuple(tuple(re.findall(r"\w+", group)) for group in groups)
        parsed.append(Dim(segments, starred[0] if starred else 0))
    return Side(plain, tuple(parsed), tuple(words.items()))


def size_of(merged: Sequence[str], axes: Axes) -> int:
    """Return the number of elements along a dim of merged axes."""
    return prod(len(axes[axis]) for axis in merged)
