"""The tensors of a checkpoint as a tree, for people.

Names nest by their dots; blocks that are alike stand there once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from math import prod

from holdfast.format.manifest import TensorEntry
from holdfast.spelling import counted, spelled_bytes

INDENT = "  "

FILES_SAID_MAX = 3


@dataclass(frozen=True, slots=True)
class Node:
    """One part of a name, and all that is below it."""

    children: dict[str, Node] = field(default_factory=dict)
    entries: list[TensorEntry] = field(default_factory=list)
    """Every tensor at or below it."""

    leaves: list[TensorEntry] = field(default_factory=list)
    """The tensor whose name ends here, if one does."""


def tree_of(tensors: Mapping[str, TensorEntry]) -> Node:
    """All tensors by their names."""
    root = Node()
    for name, entry in tensors.items():
        node = root
        node.entries.append(entry)
        for part in name.split("."):
            node = node.children.setdefault(part, Node())
            node.entries.append(entry)
        node.leaves.append(entry)
    return root


def lines(node: Node, *, each: bool = False, depth: int = 0) -> Iterator[str]:
    """The tree, a line a node. `each`: blocks that are alike, too, one by one."""
    for names, child in _grouped(node, each):
        name, below = _joined(names, child)
        yield f"{INDENT * depth}{name}{_said(names, below)}"
        yield from lines(below, each=each, depth=depth + 1)


def count(entries: list[TensorEntry]) -> tuple[int, int]:
    """Elements and bytes; what two names share counts once."""
    distinct = {tuple((c.file, c.item) for c in entry.chunks): entry for entry in entries}
    elements = sum(prod(entry.shape) for entry in distinct.values())
    return elements, sum(entry.nbytes for entry in distinct.values())


def _grouped(node: Node, each: bool) -> Iterator[tuple[list[str], Node]]:
    """Children in their order; neighbours that are numbered and alike together."""
    members = list(node.children.items())
    if all(name.isdecimal() for name in node.children):
        members.sort(key=lambda member: int(member[0]))
    for _, alike in groupby(
        members, key=lambda m: _signature(m[1]) if m[0].isdecimal() and not each else m[0]
    ):
        group = list(alike)
        yield [name for name, _ in group], group[0][1]


def _signature(node: Node) -> tuple[object, ...]:
    """Equal for blocks that hold the same names, dtypes and shapes."""
    leaves = tuple((entry.dtype, entry.shape) for entry in node.leaves)
    return leaves, tuple((name, _signature(child)) for name, child in node.children.items())


def _joined(names: list[str], node: Node) -> tuple[str, Node]:
    """A chain of nodes with one child each, as one."""
    name = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
    while len(node.children) == 1 and not node.leaves:
        ((below, node),) = node.children.items()
        name += f".{below}"
    return name, node


def _said(names: list[str], node: Node) -> str:
    times = f"  {len(names)} times" if len(names) > 1 else ""
    if node.leaves and not node.children:
        (entry,) = node.leaves
        held = Counter(chunk.file for chunk in entry.chunks)
        files = ", ".join(file + f" ({n} chunks)" * (n > 1) for file, n in held.items())
        if len(held) > FILES_SAID_MAX:
            files = counted(len(entry.chunks), "chunk") + f" in {len(held)} files"
        shape = "x".join(map(str, entry.shape)) or "scalar"
        return f"  {entry.dtype} {shape}  {spelled_bytes(entry.nbytes)}  {files}{times}"
    elements, nbytes = count(node.entries)
    return f"  {elements:,} elements, {spelled_bytes(nbytes)}{' each' if times else ''}{times}"
