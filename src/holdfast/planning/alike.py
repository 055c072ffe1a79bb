"""What ranks hold under one name must be one thing: a mixture of several is none that any rank had.

Entries of models and optimizers have names of their own on every rank that has them, so what ranks
hold of these is put together. A container of plain state is one thing: its keys, lengths and kinds
are the same on all ranks that have it, but for keys such as `rank_3` in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from holdfast.errors import MismatchError
from holdfast.format.manifest import Path
from holdfast.format.structure import MAPPINGS, Node, children_of, kind_of_node
from holdfast.planning.write_plan import AllPlans, LocalPlan

_RANK_KEY = re.compile(r"rank_\d+")
_UNIONS = ("model", "optimizer")
"""Top-level names whose dicts hold entries by the names of parameters, as stock DCP has them."""

_TENSOR, _VALUE = "a tensor", "a value"
_LEAVES = {_TENSOR, _VALUE}

_LISTED_MAX = 20


class _Holding(NamedTuple):
    """What some ranks hold below one top-level key."""

    rank: int
    """First of these ranks."""

    items: Mapping[Path, str]
    """Kind of each path."""


def check_alike(all_plans: AllPlans, size: int) -> None:
    """Make sure that containers of one path are the same on all ranks that have it.

    Raises:
        MismatchError: some are not; each difference is listed.
    """
    differing = {
        section
        for section, everyone in all_plans.items()
        if len(everyone) > 1 or len(everyone[0].ranks) < size
    }
    if not differing:
        return
    lines = [*_differences(all_plans, differing), *_lone_slots(all_plans)]
    if lines:
        more = len(lines) - _LISTED_MAX
        listed = "\n  ".join(lines[:_LISTED_MAX]) + (f"\n  ... and {more} more" if more > 0 else "")
        raise MismatchError(
            f"the state differs between ranks, nothing was saved:\n  {listed}",
            hint="state of one rank alone needs a key of its own, such as `rank_3`: in the dict "
            "that differs, or at the top: `states={'rank_3': ...}`",
        )


def _differences(all_plans: AllPlans, differing: Collection[str]) -> Iterator[str]:
    """A line on each path that is not the same on all ranks that have its top-level key.

    A key's own entry and what lies below it are in different sections.
    """
    top = [(holders.ranks, _items_of(holders.local_plan)) for holders in all_plans.get("", ())]
    heads = {str(key).partition(".")[0] for _, found in top for key in found}
    sections = [*({*differing} - {""}), *(heads & all_plans.keys() - differing)]
    below = [
        (holders.ranks, _items_of(holders.local_plan))
        for section in sorted(sections)
        for holders in all_plans[section]
    ]
    parts = [*top, *below]
    containers = {
        key: None
        for _, found in parts
        for key, items in found.items()
        # A tensor or value under a name of its own is compared by what it is elsewhere.
        if not _is_ranks(key)
        and key not in _UNIONS
        and {*items.values()} - _LEAVES | {*items} - {(key,)}
    }
    for key in containers:
        held: dict[int, tuple[int, ...]] = {}
        for number, (ranks, found) in enumerate(parts):
            for rank in ranks if key in found else ():
                held[rank] = (*held.get(rank, ()), number)
        variants: dict[tuple[int, ...], int] = {}
        for rank in sorted(held):
            variants.setdefault(held[rank], rank)
        first, *others = [
            _Holding(rank, _merged([parts[number][1][key] for number in numbers]))
            for numbers, rank in variants.items()
        ]
        for other in others:
            yield from _compared(first, other)


def _merged(parts: Sequence[Mapping[Path, str]]) -> dict[Path, str]:
    """All of these; where a leaf and what the structure says of it have one path, the latter."""
    every = [(path, kind) for items in parts for path, kind in items.items()]
    return dict(sorted(every, key=lambda one: one[1] not in _LEAVES))


def _compared(first: _Holding, other: _Holding) -> Iterator[str]:
    for path in dict.fromkeys([*first.items, *other.items]):
        one, two = first.items.get(path), other.items.get(path)
        if one == two:
            continue
        name = ".".join(map(str, path))
        if one is None or two is None:
            here, away = (first, other) if two is None else (other, first)
            yield f"`{name}` is {one or two} on rank {here.rank}, and no such on rank {away.rank}"
        else:
            yield f"`{name}` is {one} on rank {first.rank}, {two} on rank {other.rank}"


def _items_of(local_plan: LocalPlan) -> dict[str | int, dict[Path, str]]:
    """What a plan holds by top-level key, without what may differ."""
    found: dict[str | int, dict[Path, str]] = {}
    unions = local_plan.unions

    def add(path: Path, kind: str) -> None:
        if not (len(path) > 1 and _is_ranks(path[1])) and not _is_within(path, unions):
            found.setdefault(path[0], {})[path] = kind

    for tensor in local_plan.tensors.values():
        add(tensor.path, _TENSOR)
    for _, path in local_plan.aliases.values():
        add(path, _TENSOR)
    for path in local_plan.values.values():
        add(path, _VALUE)
    for path, node in local_plan.structure.items():
        for at, kind in _kinds_of(path, node, unions):
            add(at, kind)
    return found


def _kinds_of(path: Path, node: Node, unions: Collection[Path]) -> Iterator[tuple[Path, str]]:
    """Kinds of the containers that a node describes, where the names of their members do not
    tell."""
    while isinstance(node, dict) and "object" in node:
        node = node["object"]
    kind = kind_of_node(node)
    if kind in ("array", "types"):
        yield path, "a numpy array" if kind == "array" else f"a value of {node}"
    children = children_of(node)
    if children is None:
        return
    assert isinstance(node, dict)
    assert kind is not None
    kept = []
    for key, child in children:
        at = (*path, key if kind not in MAPPINGS else str(key))
        if (len(at) == 2 and _is_ranks(at[1])) or _is_within(at, unions):
            continue
        kept.append(key)
        yield from _kinds_of(at, child, unions)
    if kept and kind == "dict" and all(type(key) is str for key in kept):
        # As one whose names tell it: whether they do depends on what is left out here.
        return
    if kept or not children:
        keys = ", ".join(sorted(map(repr, kept))) if kind in MAPPINGS else f"{len(kept)} members"
        default = f", default {node['default']}" if "default" in node else ""
        yield path, f"a {kind} of {keys or 'nothing'}{default}"


def _lone_slots(all_plans: AllPlans) -> Iterator[str]:
    """Slots that only some of the ranks have whose optimizers hold the parameter."""
    for everyone in all_plans.values():
        if len(everyone) < 2:
            continue
        roots = {
            root
            for plans in (everyone, all_plans.get("", ()))
            for holders in plans
            for root, kind in holders.local_plan.unions.items()
            if kind == "optimizer"
        }
        for root in roots:
            first: dict[str, tuple[int, set[str]]] = {}
            for holders in everyone:
                for parameter, slots in _slots_of(holders.local_plan, root).items():
                    rank, known = first.setdefault(parameter, (holders.ranks[0], slots))
                    for slot in sorted(known ^ slots):
                        here, away = rank, holders.ranks[0]
                        if slot in slots:
                            here, away = away, here
                        name = ".".join(map(str, (*root, slot)))
                        yield (
                            f"`{name}` is on rank {here}, and not on rank {away}, whose optimizer "
                            "has the parameter too"
                        )


def _slots_of(local_plan: LocalPlan, root: Path) -> dict[str, set[str]]:
    """Names of the slots of each parameter that an optimizer holds."""
    at = len(root)
    paths = [
        path
        for path in (
            *local_plan.values.values(),
            *(tensor.path for tensor in local_plan.tensors.values()),
            *(path for _, path in local_plan.aliases.values()),
        )
        if path[:at] == root and len(path) > at
    ]
    found: dict[str, set[str]] = {}
    for path in paths:
        group, _, rest = str(path[at]).partition(".")
        if group == "param_groups":
            found.setdefault(rest.rpartition(".")[0], set())
    for path in paths:
        group, _, rest = str(path[at]).partition(".")
        parameter = rest.rpartition(".")[0]
        if group == "state" and parameter in found:
            found[parameter].add(str(path[at]))
    return found


def _is_ranks(key: str | int) -> bool:
    return type(key) is str and _RANK_KEY.fullmatch(key) is not None


def _is_within(path: Path, roots: Collection[Path]) -> bool:
    return bool(roots) and any(path[:length] in roots for length in range(1, len(path) + 1))
