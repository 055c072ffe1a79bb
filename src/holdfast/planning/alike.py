"""Check that containers are equal on all ranks that have them.

Entries of models and optimizers have names of their own, so those of different ranks are merged. A
container of plain state is one thing: its keys, length and kinds must be the same on all ranks that
have it. A merged one would be a state that no rank had. Keys such as `rank_3` are the exception.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from holdfast.errors import MismatchError
from holdfast.format.manifest import Path
from holdfast.format.structure import MAPPINGS, Node, children_of, kind_of_node
from holdfast.planning.write_plan import AllPlans, LocalPlan
from holdfast.spelling import listed

_RANK_KEY = re.compile(r"rank_\d+")
_UNIONS = ("model", "optimizer")
"""Top-level names whose dicts hold entries named by parameters, as in stock DCP."""

_TENSOR, _VALUE = "a tensor", "a value"
_LEAVES = {_TENSOR, _VALUE}

_LISTED_MAX = 20


class _Branch(NamedTuple):
    """Entries below one top-level key, equal on some ranks."""

    rank: int
    """First of these ranks."""

    kinds: Mapping[Path, str]
    """Kind of each path."""


def check_alike(all_plans: AllPlans, size: int) -> None:
    """Check that each container is equal on all ranks that have it.

    Raises:
        MismatchError: some containers differ; each difference is listed.
    """
    differing = {
        component
        for component, plans in all_plans.items()
        if len(plans) > 1 or len(plans[0].ranks) < size
    }
    if not differing:
        return
    lines = [*_differences(all_plans, differing), *_lone_slots(all_plans)]
    if lines:
        raise MismatchError(
            "the state differs between ranks, nothing was saved:" + listed(lines, _LISTED_MAX),
            hint="state of one rank alone needs a key of its own, such as `rank_3`: in the dict "
            "that differs, or at the top: `states={'rank_3': ...}`",
        )


def _differences(all_plans: AllPlans, differing: Collection[str]) -> Iterator[str]:
    """One line per path that is not equal on all ranks that have its top-level key."""
    # The entry of a top-level key and the entries below it are in different local plans.
    top = [(shared.ranks, _kinds_by_key(shared.local_plan)) for shared in all_plans.get("", ())]
    top_keys = {str(key).partition(".")[0] for _, branches in top for key in branches}
    components = [*({*differing} - {""}), *(top_keys & all_plans.keys() - differing)]
    below = [
        (shared.ranks, _kinds_by_key(shared.local_plan))
        for component in sorted(components)
        for shared in all_plans[component]
    ]
    plans = [*top, *below]
    containers = {
        key: None
        for _, branches in plans
        for key, kinds in branches.items()
        # `plan` compares a tensor or value that has a top-level name of its own.
        if not _is_rank_key(key)
        and key not in _UNIONS
        and {*kinds.values()} - _LEAVES | {*kinds} - {(key,)}
    }
    for key in containers:
        plans_of: dict[int, tuple[int, ...]] = {}
        for number, (ranks, branches) in enumerate(plans):
            for rank in ranks if key in branches else ():
                plans_of[rank] = (*plans_of.get(rank, ()), number)
        variants: dict[tuple[int, ...], int] = {}
        for rank in sorted(plans_of):
            variants.setdefault(plans_of[rank], rank)
        first, *others = [
            _Branch(rank, _merged([plans[number][1][key] for number in numbers]))
            for numbers, rank in variants.items()
        ]
        for other in others:
            yield from _compared(first, other)


def _merged(branches: Sequence[Mapping[Path, str]]) -> dict[Path, str]:
    """All paths. If a leaf and a container have one path, the container's kind counts."""
    every = [(path, kind) for kinds in branches for path, kind in kinds.items()]
    return dict(sorted(every, key=lambda item: item[1] not in _LEAVES))


def _compared(first: _Branch, other: _Branch) -> Iterator[str]:
    for path in dict.fromkeys([*first.kinds, *other.kinds]):
        kind, other_kind = first.kinds.get(path), other.kinds.get(path)
        if kind == other_kind:
            continue
        name = ".".join(map(str, path))
        if kind is None or other_kind is None:
            here, away = (first, other) if other_kind is None else (other, first)
            yield (
                f"`{name}` is {kind or other_kind} on rank {here.rank}, and missing on rank "
                f"{away.rank}"
            )
        else:
            yield f"`{name}` is {kind} on rank {first.rank}, {other_kind} on rank {other.rank}"


def _kinds_by_key(local_plan: LocalPlan) -> dict[str | int, dict[Path, str]]:
    """Kind of each path below each top-level key, without the entries that may differ."""
    branches: dict[str | int, dict[Path, str]] = {}
    unions = local_plan.unions

    def add(path: Path, kind: str) -> None:
        if not (len(path) > 1 and _is_rank_key(path[1])) and not _is_within(path, unions):
            branches.setdefault(path[0], {})[path] = kind

    for tensor in local_plan.tensors.values():
        add(tensor.path, _TENSOR)
    for _, path in local_plan.aliases.values():
        add(path, _TENSOR)
    for path in local_plan.values.values():
        add(path, _VALUE)
    for path, node in local_plan.structure.items():
        for node_path, kind in _kinds_of(path, node, unions):
            add(node_path, kind)
    return branches


def _kinds_of(path: Path, node: Node, unions: Collection[Path]) -> Iterator[tuple[Path, str]]:
    """Path and kind of each container of a node, except those that the names of entries tell."""
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
        child_path = (*path, key if kind not in MAPPINGS else str(key))
        if (len(child_path) == 2 and _is_rank_key(child_path[1])) or _is_within(child_path, unions):
            continue
        kept.append(key)
        yield from _kinds_of(child_path, child, unions)
    if kept and kind == "dict" and all(type(key) is str for key in kept):
        # A dict of text keys has a node on some ranks only, depending on the keys skipped here.
        return
    if kept or not children:
        keys = ", ".join(sorted(map(repr, kept))) if kind in MAPPINGS else f"{len(kept)} members"
        default = f", default {node['default']}" if "default" in node else ""
        yield path, f"a {kind} of {keys or 'nothing'}{default}"


def _lone_slots(all_plans: AllPlans) -> Iterator[str]:
    """One line per slot that is missing on a rank whose optimizer holds the slot's parameter."""
    for plans in all_plans.values():
        if len(plans) < 2:
            continue
        roots = {
            root
            for shared in (*plans, *all_plans.get("", ()))
            for root, kind in shared.local_plan.unions.items()
            if kind == "optimizer"
        }
        for root in roots:
            first: dict[str, tuple[int, set[str]]] = {}
            for shared in plans:
                for parameter, slots in _slots_of(shared.local_plan, root).items():
                    rank, known = first.setdefault(parameter, (shared.ranks[0], slots))
                    for slot in sorted(known ^ slots):
                        here, away = rank, shared.ranks[0]
                        if slot in slots:
                            here, away = away, here
                        name = ".".join(map(str, (*root, slot)))
                        yield (
                            f"`{name}` is on rank {here}, and not on rank {away}, whose optimizer "
                            "has the parameter too"
                        )


def _slots_of(local_plan: LocalPlan, root: Path) -> dict[str, set[str]]:
    """Names of the slots of each parameter, in the optimizer at `root`."""
    depth = len(root)
    paths = [
        path
        for path in (
            *local_plan.values.values(),
            *(tensor.path for tensor in local_plan.tensors.values()),
            *(path for _, path in local_plan.aliases.values()),
        )
        if path[:depth] == root and len(path) > depth
    ]
    slots: dict[str, set[str]] = {}
    for path in paths:
        group, _, rest = str(path[depth]).partition(".")
        if group == "param_groups":
            slots.setdefault(rest.rpartition(".")[0], set())
    for path in paths:
        group, _, rest = str(path[depth]).partition(".")
        parameter = rest.rpartition(".")[0]
        if group == "state" and parameter in slots:
            slots[parameter].add(str(path[depth]))
    return slots


def _is_rank_key(key: str | int) -> bool:
    return type(key) is str and _RANK_KEY.fullmatch(key) is not None


def _is_within(path: Path, roots: Collection[Path]) -> bool:
    return bool(roots) and any(path[:length] in roots for length in range(1, len(path) + 1))
