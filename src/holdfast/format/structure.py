"""JSON that describes the types of dicts, lists and keys of a state where paths do not show them.

A node describes the state below one path. The node `null` means that the paths say enough: there is
one entry, or there are entries in lists and in dicts with string keys. docs/format.md has the
grammar.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Node = str | dict[str, Any] | None
"""JSON of one node. A node from a file must first pass `check_node`."""

MAPPINGS = ("dict", "OrderedDict", "Counter", "defaultdict")
"""Kinds of nodes whose children have keys."""

SEQUENCES = ("list", "tuple")
"""Kinds of nodes whose children have indices."""

ARRAY = "array"
"""Node of a numpy array, which is stored as a tensor."""

FACTORIES: Mapping[str, Any] = {
    **{cls.__name__: cls for cls in (list, dict, set, int, float, str, bool, tuple)},
    "None": None,
}
"""Default factories that a `defaultdict` may have, by name."""

_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_FLOATS = ("float16", "float32", "float64", "complex64", "complex128")
NUMBERS = (*_INTEGERS, *_FLOATS, "str", "bytes")
"""Dtype names of the numpy scalars that are loaded as numpy scalars, not as Python numbers."""

EMPTY_BYTES = "empty bytes"
"""Type name of `b""`, which is stored as an empty string: pickle would write a call of `bytes`."""

Types = Mapping[tuple[str, ...], str]
"""Types of the members of one value that are stored as another type, by the position of the member:
the texts of the keys and indices that lead to it. The position of the value itself is ()."""

OPTIMIZERS = "optimizers"
"""Key of the member of an object's node that lists the classes of the object's optimizers. A
manifest stores this member apart from the node."""

DEPTH_MAX = 100
"""Maximum depth of nested nodes."""

KEY_CHARS_MAX = 4096
"""Maximum length of the text of a dict key that is not a string."""

_KEY_TYPES = (str, int, bool, float, bytes, type(None))


def key_text(key: object) -> str | None:
    """Format a dict key that is not a string; None if the format does not support the key.

    >>> key_text(3), key_text((1, "a")), key_text(object())
    ('3', "(1, 'a')", None)
    """
    if not is_supported_key(key):
        return None
    try:
        text = repr(key)
    except ValueError:
        return None  # Python does not format an int of more than 4,300 digits.
    return text if len(text) <= KEY_CHARS_MAX else None


def is_supported_key(key: object) -> bool:
    """Return whether the format supports keys of this type. The text of the key may be too long."""
    if type(key) is tuple:
        return all(map(is_supported_key, key))
    if type(key) is float:
        return math.isfinite(key)
    return type(key) in _KEY_TYPES


def key_of(text: str) -> Any:
    """Parse the key in a text made by `key_text`.

    Raises:
        ValueError: `key_text` cannot have made the text.

    >>> key_of("3"), key_of("(1, 'a')")
    (3, (1, 'a'))
    """
    if len(text) > KEY_CHARS_MAX:
        raise ValueError("a key of too many characters")
    try:
        key = ast.literal_eval(text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no key: {text[:50]!r}") from error
    if not is_supported_key(key):
        raise ValueError(f"no key of a dict: {text[:50]!r}")
    return key


def children_of(node: Node) -> list[tuple[Any, Node]] | None:
    """Return the children of the node of a dict, list or tuple, each with its key or index. Return
    None for other nodes.

    >>> children_of({"dict": {"a": None}}), children_of({"dict": [["3", None]]})
    ([('a', None)], [(3, None)])
    >>> children_of({"tuple": [None, "array"]}), children_of("array")
    ([(0, None), (1, 'array')], None)
    """
    kind = kind_of_node(node)
    if kind in MAPPINGS:
        assert isinstance(node, dict)
        children = node[kind]
        if isinstance(children, dict):
            return list(children.items())
        return [(key_of(text), child) for text, child in children]
    if kind in SEQUENCES:
        assert isinstance(node, dict)
        return list(enumerate(node[kind]))
    return None


def kind_of_node(node: Node) -> str | None:
    """Return the kind of a node: the key of its first member, or the node itself if it is a string
    or None.

    >>> kind_of_node({"list": []}), kind_of_node("array"), kind_of_node(None)
    ('list', 'array', None)
    """
    return next(iter(node)) if isinstance(node, dict) else node


def types_in(node: Node) -> Types:
    """Return the types that the node of a value states; empty if it states none.

    >>> types_in({"types": [[[], "float32"]]}), types_in(None)
    ({(): 'float32'}, {})
    """
    stated = node.get("types", ()) if isinstance(node, dict) else ()
    return {tuple(keys): name for keys, name in stated}


def types_by_path(structure: Mapping[Any, Node] | None) -> dict[tuple[str | int, ...], Types]:
    """Return the types of all values with members that are stored as another type, by the path of
    the value.

    >>> types_by_path({("a",): {"dict": [["1", {"types": [[[], "empty bytes"]]}]]}})
    {('a', '1'): {(): 'empty bytes'}}
    """
    found: dict[tuple[str | int, ...], Types] = {}
    waiting = [(tuple(path), node) for path, node in (structure or {}).items()]
    while waiting:
        path, node = waiting.pop()
        if types := types_in(node):
            found[path] = types
        elif isinstance(node, dict) and "object" in node:
            waiting.append((path, node["object"]))
        is_mapping = kind_of_node(node) in MAPPINGS
        waiting += [
            ((*path, str(key) if is_mapping else key), child)
            for key, child in children_of(node) or ()
        ]
    return found


def with_types(
    value: Any,
    types: Types,
    made: Callable[[str, Any], Any] = lambda _, number: number,
    keys: tuple[str, ...] = (),
) -> Any:
    """Return a value with the members that have the stated types in place of the stored ones.

    `made(name, number)` returns the numpy scalar of dtype `name`; by default, the stored number.
    `keys`: position of `value` in the whole value.

    >>> with_types([1, ("", "a")], {("0",): "int8", ("1", "0"): "empty bytes"})
    [1, (b'', 'a')]
    """
    if keys in types:
        return b"" if types[keys] == EMPTY_BYTES else made(types[keys], value)
    if not any(position[: len(keys)] == keys for position in types):
        return value
    if type(value) in (list, tuple):
        members = (
            with_types(member, types, made, (*keys, str(number)))
            for number, member in enumerate(value)
        )
        return type(value)(members)
    if isinstance(value, dict):
        return type(value)(
            (key, with_types(member, types, made, (*keys, key_text(key) or "")))
            for key, member in value.items()
        )
    return value


def mapping_node(kind: str, children: Sequence[tuple[Any, Node]], **more: object) -> Node:
    """Return the node of a dict. `kind` is one of `MAPPINGS`. `key_text` must support all keys.
    `more`: further members of the node.

    >>> mapping_node("dict", [("a", None)]), mapping_node("dict", [(1, None)])
    ({'dict': {'a': None}}, {'dict': [['1', None]]})
    """
    if all(type(key) is str for key, _ in children):
        return {kind: dict(children), **more}
    return {kind: [[key_text(key), child] for key, child in children], **more}


def with_optimizers(node: Node, other: Mapping[str, Any]) -> Node:
    """Return `node` with the optimizer classes of `other` added. `other` is another rank's node of
    the same object.

    >>> with_optimizers({"object": None, "optimizers": ["a"]}, {"optimizers": ["a", "b"]})
    {'object': None, 'optimizers': ['a', 'b']}
    """
    if not isinstance(node, dict):
        return node
    return {
        **node,
        OPTIMIZERS: list(dict.fromkeys([*node.get(OPTIMIZERS, []), *other[OPTIMIZERS]])),
    }


def members_of(structure: Mapping[Any, Node] | None) -> dict[str, list[Any]]:
    """Return the members of a manifest that store the structure, given its nodes by path.

    The classes of optimizers are a separate member, since no reader needs them to rebuild a state.

    >>> members_of({("o",): {"object": None, "optimizers": ["a"]}, ("t",): {"tuple": []}})
    {'structure': [[('t',), {'tuple': []}]], 'optimizers': [[('o',), ['a']]]}
    """
    if structure is None:
        return {}
    nodes, optimizers = [], []
    for path, node in structure.items():
        rest = node
        if isinstance(node, dict) and OPTIMIZERS in node:
            optimizers.append([path, node[OPTIMIZERS]])
            rest = {key: value for key, value in node.items() if key != OPTIMIZERS}
        if rest is node or rest != {"object": None}:
            nodes.append([path, rest])
    return {"structure": nodes, **({"optimizers": optimizers} if optimizers else {})}


def with_classes(nodes: dict[Any, Node], optimizers: Mapping[Any, Any]) -> dict[Any, Node]:
    """Add lists of optimizer classes, given by path, to the nodes at these paths. Return all nodes.

    Raises:
        ValueError: the classes are not lists of strings.

    >>> with_classes({}, {("o",): ["a"]})
    {('o',): {'object': None, 'optimizers': ['a']}}
    """
    for path, names in optimizers.items():
        node = nodes.get(path) or {"object": None}
        if isinstance(node, dict):
            nodes[path] = check_node({**node, OPTIMIZERS: names})
    return nodes


def check_node(node: object, depth: int = 0) -> Node:
    """Check a node from an untrusted file, and return it.

    Raises:
        ValueError: the node is invalid, or nested deeper than `DEPTH_MAX` levels.
    """
    if depth > DEPTH_MAX:
        raise ValueError(f"a structure of more than {DEPTH_MAX} levels")
    if node is None or node == ARRAY:
        return node
    if not isinstance(node, dict) or not node:
        raise ValueError("a structure with a node without a kind")
    kind, content = next(iter(node.items()))
    check = _CHECKS.get(kind)
    if check is None:
        raise ValueError(f"a structure with a node of unknown kind {kind[:50]!r}")
    check(node, content, depth + 1)
    return node


def _check_mapping(node: Mapping[str, Any], content: Any, depth: int) -> None:
    if isinstance(content, dict):
        children = list(content.values())
    else:
        keys = [key_of(text) for text, _ in content if type(text) is str]
        if len(keys) != len(content) or len({*keys}) != len(keys):
            raise ValueError("a dict has keys that are no texts, or equal")
        children = [child for _, child in content]
    if "defaultdict" in node and node.get("default") not in [*FACTORIES]:
        raise ValueError("a defaultdict with an unknown default")
    for child in children:
        check_node(child, depth)


def _check_sequence(_: Mapping[str, Any], content: Any, depth: int) -> None:
    if not isinstance(content, list):
        raise ValueError("a sequence without a list of nodes")
    for child in content:
        check_node(child, depth)


def _check_object(node: Mapping[str, Any], content: Any, depth: int) -> None:
    names = node.get(OPTIMIZERS, [])
    if not isinstance(names, list) or not all(type(name) is str for name in names):
        raise ValueError("optimizers whose classes are no texts")
    check_node(content, depth)


def _check_types(_: Mapping[str, Any], content: Any, __: int) -> None:
    for path, name in content:
        if name not in (*NUMBERS, EMPTY_BYTES) or not all(type(key) is str for key in path):
            raise ValueError("a value has a member of unknown type")
        for key in path:
            key_of(key)


def _check_tensor(_: Mapping[str, Any], content: Any, __: int) -> None:
    if not isinstance(content, dict) or not all(type(value) is str for value in content.values()):
        raise ValueError("a tensor has a member that is no text")


def _check_subclass(_: Mapping[str, Any], content: Any, depth: int) -> None:
    sizes = [*content["size"], *content["stride"]]
    if type(content["class"]) is not str or not all(type(size) is int for size in sizes):
        raise ValueError("a tensor class without a name, or without sizes")
    for child in content["inner"].values():
        check_node(child, depth)


_CHECKS = {
    **dict.fromkeys(MAPPINGS, _check_mapping),
    **dict.fromkeys(SEQUENCES, _check_sequence),
    "object": _check_object,
    "types": _check_types,
    "tensor": _check_tensor,
    "subclass": _check_subclass,
}
