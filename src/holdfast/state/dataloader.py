"""Data loaders as components of the state."""

from __future__ import annotations

from holdfast.state.stateful import ObjectState, RankState
from holdfast.state.tree import Stateful


def loader_component(loader: Stateful, rank: int) -> ObjectState | RankState:
    """Return the component of a data loader.

    If the loader has `state_is_global = True`, its state is valid on all ranks, for instance as a
    position in a global order of samples. It is saved once, and any number of ranks can load it.
    Otherwise each rank saves its own state, and a load needs the same number of ranks.
    """
    # torchdata's loader creates its iterator in `state_dict`, and keeps it. The iterator draws a
    # seed, so the load must create it before it restores the generators.
    state = ObjectState(loader, is_read_back=True)
    return state if getattr(loader, "state_is_global", False) else RankState(state, rank)
