"""Check that dicts, lists and the like have equal keys and lengths on all ranks that have them.

Models and optimizers may have different entries on each rank. A save merges these entries. Any
other dict or list must have the same keys, length and kinds of entries on all ranks that have it,
because merging different ones would make a state that no rank had. Entries below keys such as
`rank_3` are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from holdfast.errors import MismatchError
from holdfast.format.manifest import Path
from holdfast.format.structure import MAPPINGS, Node, children_of, kind_of_node
from holdfast.planning.write_plan import AllPlans, LocalPlan
from holdfast.spelling import listed

_RANK_KEY = re.compile(r"rank_\d+")
_UNIONS = ("model", "optimizer")
"""Top-level names whose entries are named by parameters, as in stock DCP. Ranks may have different
parameters."""

_TENSOR, _VALUE = "a tensor", "a value"
_LEAVES = {_TENSOR, _VALUE}

_LISTED_MAX = 20


def check_alike(all_plans: AllPlans, size: int) -> None:
    """Check that each dict, list or other container of the state has the same keys, length and
    kinds of entries on all ranks that have it. `size`: number of ranks.

    Raises:
        MismatchError: some containers differ. The message lists the differences.
    """
    if all(len(plans) == 1 and len(plans[0].ranks) == size for plans in all_plans.values()):
        return
    lines = [*_differences(all_plans), *_lone_slots(all_plans)]
    if lines:
        raise MismatchError(
            "the state differs between ranks, nothing was saved:" + listed(lines, _LISTED_MAX),
            hint="state of one rank alone needs a key of its own, such as `rank_3`: in the dict "
            "that differs, or at the top: `states={'rank_3': ...}`",
        )


def _differences(all_plans: AllPlans) -> Iterator[str]:
    """Yield one line per path that is of different kinds on two ranks, such as a tensor and a dict,
    or lists of different lengths. Compare only ranks that have the top-level key of the path."""
    plans = [
        (shared.ranks, _kinds_by_key(shared.local_plan))
        for component in sorted(all_plans)
        for shared in all_plans[component]
    ]
    containers = {
        key: None
        for _, branches in plans
        for key, kinds in branches.items()
        # Leave out tensors and values at the top level, since `plan` compares them.
        if {*kinds.values()} - _LEAVES | {*kinds} - {(key,)}
    }
    for key in containers:
        # A rank has two local plans for a top-level key: one for what is at the key itself, and one
        # for the entries below it.
        plans_of: dict[int, tuple[int, ...]] = {}
        for number, (ranks, branches) in enumerate(plans):
            for rank in ranks if key in branches else ():
                plans_of[rank] = (*plans_of.get(rank, ()), number)
        first_ranks: dict[tuple[int, ...], int] = {}
        for rank in sorted(plans_of):
            first_ranks.setdefault(plans_of[rank], rank)
        first, *others = [
            (rank, _merged([plans[number][1][key] for number in numbers]))
            for numbers, rank in first_ranks.items()
        ]
        for other in others:
            yield from _compared(*first, *other)


def _merged(branches: Sequence[Mapping[Path, str]]) -> dict[Path, str]:
    """Merge several dicts of kinds by path. If a path is a leaf in one and a dict or list in
    another, keep the dict or list."""
    every = [(path, kind) for kinds in branches for path, kind in kinds.items()]
    return dict(sorted(every, key=lambda item: item[1] not in _LEAVES))


def _compared(
    rank: int, kinds: Mapping[Path, str], other_rank: int, other_kinds: Mapping[Path, str]
) -> Iterator[str]:
    """Yield one line per path whose kind differs between two ranks."""
    for path in dict.fromkeys([*kinds, *other_kinds]):
        kind, other_kind = kinds.get(path), other_kinds.get(path)
        if kind == other_kind:
            continue
        name = ".".join(map(str, path))
        if other_kind is None:
            yield f"`{name}` is {kind} on rank {rank}, and missing on rank {other_rank}"
        elif kind is None:
            yield f"`{name}` is {other_kind} on rank {other_rank}, and missing on rank {rank}"
        else:
            yield f"`{name}` is {kind} on rank {rank}, {other_kind} on rank {other_rank}"


def _kinds_by_key(local_plan: LocalPlan) -> dict[str | int, dict[Path, str]]:
    """Return the kinds of all paths, such as "a tensor", keyed by top-level key and then by path.
    Leave out paths that may differ between ranks."""
    unions = local_plan.unions
    kinds = [*_leaves(local_plan)]
    for path, node in local_plan.structure.items():
        kinds += _kinds_of(path, node, unions)
    branches: dict[str | int, dict[Path, str]] = {}
    for path, kind in kinds:
        is_apart = path[0] in _UNIONS or any(map(_is_rank_key, path[:2]))
        if not is_apart and not _is_within(path, unions):
            branches.setdefault(path[0], {})[path] = kind
    return branches


def _leaves(local_plan: LocalPlan) -> Iterator[tuple[Path, str]]:
    """Yield the path and kind of each leaf."""
    yield from ((tensor.path, _TENSOR) for tensor in local_plan.tensors.values())
    yield from ((path, _TENSOR) for _, path in local_plan.aliases.values())
    yield from ((path, _VALUE) for path in local_plan.values.values())


def _kinds_of(path: Path, node: Node, unions: Collection[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the path and kind of each dict, list or other container that the node at `path`
    describes. Leave out dicts that follow from the paths of their entries, and everything below a
    path in `unions`, which may differ between ranks."""
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
        # Do not compare the keys of this dict: another rank may have no node for the dict, if all
        # of its keys there were left out above. The entries below it are compared on their own.
        return
    if kept or not children:
        keys = ", ".join(sorted(map(repr, kept))) if kind in MAPPINGS else f"{len(kept)} members"
        default = f", default {node['default']}" if "default" in node else ""
        yield path, f"a {kind} of {keys or 'nothing'}{default}"


def _lone_slots(all_plans: AllPlans) -> Iterator[str]:
    """Yield one line per optimizer slot that one rank has and another lacks, although the
    optimizers of both ranks have the parameter."""
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
    """Return the names of the slots of each parameter in the optimizer at `root`."""
    depth = len(root)
    slots: dict[str, set[str]] = {}
    parameters: list[str] = []
    for path, _ in _leaves(local_plan):
        if path[:depth] == root and len(path) > depth:
            name = str(path[depth])
            group, _, rest = name.partition(".")
            parameter = rest.rpartition(".")[0]
            if group == "param_groups":
                parameters.append(parameter)
            elif group == "state":
                slots.setdefault(parameter, set()).add(name)
    return {parameter: slots.get(parameter, set()) for parameter in parameters}


def _is_rank_key(key: str | int) -> bool:
    return type(key) is str and _RANK_KEY.fullmatch(key) is not None


def _is_within(path: Path, roots: Collection[Path]) -> bool:
    return bool(roots) and any(path[:length] in roots for length in range(1, len(path) + 1))
