"""Learning-rate schedulers as one component of the state."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.errors import UsageError
from holdfast.format.structure import Node, children_of, kind_of_node, mapping_node
from holdfast.state.match import Match
from holdfast.state.same import same
from holdfast.state.stateful import NoState, ObjectState
from holdfast.state.stored import object_node
from holdfast.state.tree import Flattener, Path, Stateful, spelled


class SchedulerState:
    """One or several schedulers as one component of the state.

    Schedulers in step with one another, as those of a pipeline's parts are, are kept once, so that
    another number of parts can take them. Others lie below their number, each as an object: that
    tells them from one scheduler whose state has numbers for keys.
    """

    def __init__(self, schedulers: Sequence[Stateful]) -> None:
        self._schedulers = list(schedulers)

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the state of all, or that of each below its number."""
        states = [scheduler.state_dict() for scheduler in self._schedulers]
        if all(same(state, states[0]) for state in states):
            node = flattener.walk(path, states[0], rebuilt=True)
            if _count(node) is not None:
                raise UsageError(
                    f"the state of the scheduler `{spelled(path)}` is objects under the keys 0, 1, "
                    "..., which a load would take for several schedulers",
                    hint="give the objects other keys, or give each to the manager",
                )
            return node
        return mapping_node(
            "dict",
            [
                (str(number), {"object": flattener.walk((*path, str(number)), state, rebuilt=True)})
                for number, state in enumerate(states)
            ],
        )

    def match(self, match: Match, path: Path) -> None:
        """Have each scheduler given its own state, or the one that was kept for all."""
        count = _count(object_node(match.stored.node(path)))
        if count is None:
            for scheduler in self._schedulers:
                ObjectState(scheduler).match(match, path)
        elif count != len(self._schedulers):
            what = f"is the state of {count} schedulers that differ in the checkpoint"
            match.mismatch(spelled(path), f"{what}, {len(self._schedulers)} here")
            match.taken.update(match.stored.below(path).entries())
        else:
            for number, scheduler in enumerate(self._schedulers):
                ObjectState(scheduler).match(match, (*path, str(number)))


def _count(node: Node) -> int | None:
    """Number of the schedulers that lie below their numbers; None where one state is kept."""
    held = children_of(node) if kind_of_node(node) == "dict" else None
    if not held or len(held) == 1:
        return None
    numbered = [key for key, _ in held] == [str(number) for number in range(len(held))]
    are_objects = all(kind_of_node(child) == "object" for _, child in held)
    return len(held) if numbered and are_objects else None


def scheduler_component(schedulers: Sequence[Stateful]) -> SchedulerState | NoState:
    """Schedulers as one component; what is stored is left over where there are none."""
    return SchedulerState(schedulers) if schedulers else NoState()
