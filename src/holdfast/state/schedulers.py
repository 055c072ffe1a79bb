"""Learning-rate schedulers as one piece of state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdfast.state.same import same
from holdfast.state.stateful import NoState, ObjectState
from holdfast.state.tree import Stateful


class SchedulerState:
    """One or several schedulers as one `Stateful`.

    Schedulers in step with one another, as those of a pipeline's parts are, are kept once, so that
    another number of parts can take them. Others lie below their number.
    """

    def __init__(self, schedulers: Sequence[Stateful]) -> None:
        self._schedulers = list(schedulers)

    def state_dict(self) -> dict[str, Any]:
        """The state of all, or that of each by its number."""
        states = [scheduler.state_dict() for scheduler in self._schedulers]
        if all(same(state, states[0]) for state in states):
            return states[0] if states else {}
        return {str(number): state for number, state in enumerate(states)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each scheduler its state."""
        for number, scheduler in enumerate(self._schedulers):
            scheduler.load_state_dict(state_dict.get(str(number), state_dict))


def scheduler_component(schedulers: Sequence[Stateful]) -> ObjectState | NoState:
    """Schedulers as one component; what is stored is left over where there are none."""
    return ObjectState(SchedulerState(schedulers)) if schedulers else NoState()
