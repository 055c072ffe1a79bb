"""Relations: which elements of one checkpoint's tensors are which elements of another's.

A relation writes two tensors over the same axes, and so reads in either direction, on whole
tensors or on any box of them:

    attention.wq.weight       | (h r s) d | self_attn.q_proj.weight             | (h s r) d
    moe.experts.w1            | e f d     | mlp.experts.{e}.gate_proj.weight    | f d
    feed_forward.{g:w1,w3}    | f d       | mlp.gate_up_proj.weight             | (g f) d
    attention.wk.weight       | (k x) d   | self_attn.qkv_proj.weight | (h x)+*(k x)+(k x) d

`(h r s)` is one dim of three axes, the first one outermost. `{e}` in a name: each index of that
axis has a tensor of its own; `{g:w1,w3}`: by these words. `a+*b+c` is a dim of three segments, of
which the relation is about the one with the star. A fifth column names a dtype that the tensor
keeps whatever the others are converted to. Rename, transpose, permute, stack, fuse and split are
all this one thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

Axes = Mapping[str, Sequence[int]]
"""The indices of each axis, as names spell them: most often `range(size)`."""

_PLACE = re.compile(r"\{(\w+)(?::([^}]*))?\}")
_GROUP = re.compile(r"\*?\([^)]*\)|\*?\w+")


@dataclass(frozen=True, slots=True)
class Dim:
    """One dim of a tensor: segments one after the other, each of merged axes."""

    segments: tuple[tuple[str, ...], ...]
    """Axes of each segment, outermost first; an empty one has one element."""

    own: int = 0
    """The segment that the relation is about."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Of the segment that the relation is about."""
        return self.segments[self.own]

    def bounds(self, axes: Axes) -> tuple[int, int]:
        """Where that segment begins and ends."""
        sizes = [size_of(segment, axes) for segment in self.segments]
        start = sum(sizes[: self.own])
        return start, start + sizes[self.own]

    def size(self, axes: Axes) -> int:
        """Elements along the whole dim."""
        return sum(size_of(segment, axes) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two tensors, or families of tensors, that a relation is about."""

    name: str
    """With a place for each axis that chooses between tensors."""

    dims: tuple[Dim, ...]

    words: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """For axes that are not spelled by their indices: the words in their place."""

    @property
    def name_axes(self) -> tuple[str, ...]:
        """Axes that choose between tensors."""
        return tuple(match[1] for match in _PLACE.finditer(self.name))

    @property
    def axes(self) -> tuple[str, ...]:
        """Of its name and its dims."""
        return *self.name_axes, *(axis for dim in self.dims for axis in dim.axes)

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """Of each of the tensors."""
        return tuple(dim.size(axes) for dim in self.dims)

    def spelled(self, indices: Mapping[str, int], axes: Axes) -> str:
        """Name of the tensor for these positions along the axes of the name."""
        words = dict(self.words)

        def spell(match: re.Match[str]) -> str:
            axis = match[1]
            if axis in words:
                return words[axis][indices[axis]]
            return str(axes[axis][indices[axis]])

        return _PLACE.sub(spell, self.name)

    def names(self, axes: Axes) -> list[tuple[str, dict[str, int]]]:
        """Every tensor of this side, with its position along the axes of the name."""
        extents = [range(len(axes[axis])) for axis in self.name_axes]
        found = []
        for at in product(*extents):
            indices = dict(zip(self.name_axes, at, strict=True))
            found.append((self.spelled(indices, axes), indices))
        return found


@dataclass(frozen=True, slots=True)
class Relation:
    """Elements of the native side that are elements of the hub's, one by one."""

    native: Side
    hub: Side
    dtype: str | None = None
    """What the tensor stays in, whatever the others are converted to."""

    def __post_init__(self) -> None:
        held = [sorted({*side.axes}) for side in self.sides]
        if held[0] != held[1] or any(len({*a}) < len(a) for a in (s.axes for s in self.sides)):
            raise ValueError(f"both sides need the same axes, each once: {self}")

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.native, self.hub

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """Axes whose size follows from the words that spell them."""
        return {**dict(self.native.words), **dict(self.hub.words)}


@dataclass(frozen=True, slots=True)
class Alias:
    """A second name of a tensor, on each side: a tied embedding."""

    native: str
    native_of: str
    hub: str
    hub_of: str


def table(text: str, native: str = "", hub: str = "") -> tuple[Relation, ...]:
    """The relations in a table, a line each; `native` and `hub` stand before every name."""
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        cells = [cell.strip() for cell in line.split("|")]
        if not 3 <= len(cells) <= 5:
            raise ValueError(f"a relation has 3 to 5 columns: {line}")
        ours, dims, theirs = cells[:3]
        hub_dims = cells[3] if len(cells) > 3 and cells[3] else dims
        dtype = cells[4] if len(cells) > 4 else None
        rows.append(Relation(side(native + ours, dims), side(hub + theirs, hub_dims), dtype))
    return tuple(rows)


def side(name: str, dims: str) -> Side:
    """One side of a relation, as its columns spell it."""
    words = {m[1]: tuple(m[2].split(",")) for m in _PLACE.finditer(name) if m[2]}
    plain = _PLACE.sub(lambda match: f"{{{match[1]}}}", name)
    found = []
    for text in re.findall(r"(?:\*?\([^)]*\)|[^\s(])+", dims):
        groups = _GROUP.findall(text)
        starred = [n for n, group in enumerate(groups) if group.startswith("*")]
        segments = tuple(tuple(re.findall(r"\w+", group)) for group in groups)
        found.append(Dim(segments, starred[0] if starred else 0))
    return Side(plain, tuple(found), tuple(words.items()))


def size_of(merged: Sequence[str], axes: Axes) -> int:
    """Elements along merged axes."""
    return prod(len(axes[axis]) for axis in merged)
