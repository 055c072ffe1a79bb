"""Learning-rate schedulers as one component of the state."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.errors import UsageError
from holdfast.format.structure import Node, children_of, kind_of_node, mapping_node
from holdfast.state.match import Match
from holdfast.state.same import same
from holdfast.state.stateful import ObjectState
from holdfast.state.stored import object_node
from holdfast.state.tree import Flattener, Path, Stateful, dotted


class SchedulerState:
    """One or several schedulers as one component of the state.

    If all states are equal, as in the stages of a pipeline, one is saved, so that any number of
    schedulers can load it. Otherwise each state is saved below its number. Each is marked as an
    object, because the state of a single scheduler may have numbers as keys too.
    """

    def __init__(self, schedulers: Sequence[Stateful]) -> None:
        self._schedulers = list(schedulers)

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the state of all schedulers, or the state of each one below its number."""
        states = [scheduler.state_dict() for scheduler in self._schedulers]
        if not states:
            return None
        if all(same(state, states[0]) for state in states):
            node = flattener.walk(path, states[0], rebuilt=True)
            if _count(node) is not None:
                raise UsageError(
                    f"the state of the scheduler `{dotted(path)}` has objects under the keys 0, 1 "
                    "and so on, which a load would take for several schedulers",
                    hint="use other keys, or save each object under its own name",
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
        """Plan to load each scheduler from its own state, or all from one state. Without
        schedulers, a load lists the stored entries as unexpected."""
        count = _count(object_node(match.stored.node(path)))
        if count is None or not self._schedulers:
            for scheduler in self._schedulers:
                ObjectState(scheduler).match(match, path)
        elif count != len(self._schedulers):
            what = f"has the states of {count} different schedulers in the checkpoint"
            what = f"{what}, {len(self._schedulers)} here"
            match.mismatch(dotted(path), what, match.stored.below(path))
        else:
            for number, scheduler in enumerate(self._schedulers):
                ObjectState(scheduler).match(match, (*path, str(number)))


def _count(node: Node) -> int | None:
    """Return how many states are stored, each below its number; None if there is one state for all
    schedulers."""
    children = children_of(node) if kind_of_node(node) == "dict" else None
    if not children or len(children) == 1:
        return None
    numbered = [key for key, _ in children] == [str(number) for number in range(len(children))]
    are_objects = all(kind_of_node(child) == "object" for _, child in children)
    return len(children) if numbered and are_objects else None
