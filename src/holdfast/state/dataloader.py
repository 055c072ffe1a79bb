"""A data loader's place in the data."""

from __future__ import annotations

from holdfast.format.structure import Node
from holdfast.state.match import Match
from holdfast.state.stateful import ObjectState, RankState
from holdfast.state.tree import Flattener, Path, Stateful


class LoaderState:
    """A data loader as a component, whatever its state means on other ranks.

    A loader that says `state_is_global = True` has one state for all ranks: a position in a global
    order of samples, say. It is kept once, and any number of ranks can take it. Of any other loader
    each rank's state is its own, and fits the same number of ranks only.
    """

    def __init__(self, loader: Stateful, rank: int) -> None:
        is_global = bool(getattr(loader, "state_is_global", False))
        # torchdata's loader makes its iterator when it is asked for its state, and keeps it. The
        # iterator draws a seed: it must do so before the generators are put where they were.
        state = ObjectState(loader, is_read_back=True)
        self._state = state if is_global else RankState(state, rank)

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the loader's state."""
        return self._state.flatten(flattener, path)

    def match(self, match: Match, path: Path) -> None:
        """Have the loader's state read and handed to it."""
        self._state.match(match, path)
