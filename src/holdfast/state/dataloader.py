"""Data loaders as components of the state."""

from __future__ import annotations

from holdfast.format.structure import Node
from holdfast.state.match import Match
from holdfast.state.stateful import ObjectState, RankState
from holdfast.state.tree import Flattener, Path, Stateful


class LoaderState:
    """A data loader as a component of the state.

    If the loader has `state_is_global = True`, its state is valid on all ranks, for instance as a
    position in a global order of samples. It is saved once, and any number of ranks can load it.
    Otherwise each rank saves its own state, and a load needs the same number of ranks.
    """

    def __init__(self, loader: Stateful, rank: int) -> None:
        is_global = bool(getattr(loader, "state_is_global", False))
        # torchdata's loader creates its iterator in `state_dict`, and keeps it. The iterator draws
        # a seed, so the load must create it before it restores the generators.
        state = ObjectState(loader, is_read_back=True)
        self._state = state if is_global else RankState(state, rank)

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the loader's state."""
        return self._state.flatten(flattener, path)

    def match(self, match: Match, path: Path) -> None:
        """Plan to load the loader's state."""
        self._state.match(match, path)
