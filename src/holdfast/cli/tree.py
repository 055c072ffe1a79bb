"""Format the tensors of a checkpoint as a tree of their dotted names. Equal layers share a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from math import prod

from holdfast.cli.terminal import spelled_shape
from holdfast.format.manifest import TensorEntry
from holdfast.spelling import counted, spelled_bytes

INDENT = "  "

FILES_MAX = 3
"""Maximum number of file names in a line."""


@dataclass(frozen=True, slots=True)
class TreeNode:
    """One part of a dotted name, and everything below it."""

    children: dict[str, TreeNode] = field(default_factory=dict)
    entries: list[TensorEntry] = field(default_factory=list)
    """All tensors at or below this node."""

    leaves: list[TensorEntry] = field(default_factory=list)
    """Tensor whose name ends at this node, if there is one."""


def tree_of(tensors: Mapping[str, TensorEntry]) -> TreeNode:
    """Build a tree of tensors by the parts of their names. Return its root."""
    root = TreeNode()
    for name, entry in tensors.items():
        node = root
        node.entries.append(entry)
        for part in name.split("."):
            node = node.children.setdefault(part, TreeNode())
            node.entries.append(entry)
        node.leaves.append(entry)
    return root


def lines(node: TreeNode, *, each: bool = False, depth: int = 0) -> Iterator[str]:
    """Yield lines of text that show the tree below a node.

    `each`: whether each of several equal layers has its own line. `depth`: levels to indent.
    """
    for names, child in _grouped(node, each):
        name, below = _joined(names, child)
        yield f"{INDENT * depth}{name}{_spelled(names, below)}"
        yield from lines(below, each=each, depth=depth + 1)


def count(entries: list[TensorEntry]) -> tuple[int, int]:
    """Return how many elements and bytes the tensors have together. Tied tensors count once."""
    distinct = {tuple((c.file, c.item) for c in entry.chunks): entry for entry in entries}
    elements = sum(prod(entry.shape) for entry in distinct.values())
    return elements, sum(entry.nbytes for entry in distinct.values())


def _grouped(node: TreeNode, each: bool) -> Iterator[tuple[list[str], TreeNode]]:
    """Group the children of a node. Yield the names in each group, and its first child.

    Adjacent children form a group if their names are numbers, and the tensors below them have equal
    names, dtypes and shapes, as in equal layers. If `each` is true, each child is a group.
    """
    members = list(node.children.items())
    if all(name.isdecimal() for name in node.children):
        members.sort(key=lambda member: int(member[0]))
    for _, equal in groupby(
        members, key=lambda m: _signature(m[1]) if m[0].isdecimal() and not each else m[0]
    ):
        group = list(equal)
        yield [name for name, _ in group], group[0][1]


def _signature(node: TreeNode) -> tuple[object, ...]:
    """Return a value that is equal for two nodes if the tensors below them have equal names,
    dtypes and shapes."""
    leaves = tuple((entry.dtype, entry.shape) for entry in node.leaves)
    return leaves, tuple((name, _signature(child)) for name, child in node.children.items())


def _joined(names: list[str], node: TreeNode) -> tuple[str, TreeNode]:
    """Follow the chain of nodes that begins with `node`, while each has one child and no tensor.

    Return the joined name of the chain and its last node. `names`: names of the equal nodes for
    which `node` stands.
    """
    name = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
    while len(node.children) == 1 and not node.leaves:
        ((below, node),) = node.children.items()
        name += f".{below}"
    return name, node


def _spelled(names: list[str], node: TreeNode) -> str:
    times = f"  {len(names)} times" if len(names) > 1 else ""
    if node.leaves and not node.children:
        (entry,) = node.leaves
        chunks = Counter(chunk.file for chunk in entry.chunks)
        files = ", ".join(file + f" ({n} chunks)" * (n > 1) for file, n in chunks.items())
        if len(chunks) > FILES_MAX:
            files = counted(len(entry.chunks), "chunk") + f" in {len(chunks)} files"
        shape, nbytes = spelled_shape(entry.shape), spelled_bytes(entry.nbytes)
        return f"  {entry.dtype} {shape}  {nbytes}  {files}{times}"
    elements, total = count(node.entries)
    return f"  {elements:,} elements, {spelled_bytes(total)}{' each' if times else ''}{times}"
