"""A data loader's place in the data."""

from __future__ import annotations

from typing import Any

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
        self._owner = _Started(loader)
        is_global = bool(getattr(loader, "state_is_global", False))
        self._state = ObjectState(self._owner) if is_global else RankState(self._owner, rank)

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the loader's state."""
        return self._state.flatten(flattener, path)

    def match(self, match: Match, path: Path) -> None:
        """Have the loader's state read and handed to it."""
        self._state.match(match, path)


class _Started:
    """A loader that begins where it was put as soon as it is put there."""

    def __init__(self, loader: Stateful) -> None:
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loader.load_state_dict(state_dict)
        # torchdata's loader makes its iterator when it is asked for its state, and keeps it. The
        # iterator draws a seed: it must do so before the generators are put where they were.
        self._loader.state_dict()
